"""Options of experiments, of `vpt robustness`, `attention` and `profile`: odd values, and those that are ignored."""

from __future__ import annotations

from pathlib import Path

from . import Row


def files(here: Path) -> None:
    """Makes what the rows name."""
    (here / "grid.yaml").write_text("grid: {model.base_lr: [0.01, 0.04]}\nseeds: [1]\n")
    (here / "nan.yaml").write_text("grid: {model.base_lr: [.nan]}\n")
    (here / "list.yaml").write_text("- a\n")
    (here / "latin1.yaml").write_bytes(b"# na\xefve\n")


_DEMO = "-c {configs}/demo.yaml"
_RUN = f"{_DEMO} --serial --out out"
_SWEEP = f"sweep {_RUN} --grid grid.yaml"
_HEAD = "robustness head --backbone vit_nano_patch8_64 --data {configs}/demo.yaml --out head.safetensors"
_SOUP = "robustness soup --deltas {delta} other.safetensors --out soup.safetensors"
_EVALUATE = "robustness run --delta {delta} --max-images 1 --out out"
_LEARN = "robustness strengths --delta {delta} --out learned.json"
_ATTEND = "attention --delta {delta}"
_NANO = "vit_nano_patch8_64"
_ON_RAY = f"sweep {_DEMO} --grid grid.yaml --out out"
_COMMANDS = {  # of experiments, with what each needs
    "sweep": "--grid grid.yaml",
    "fewshot": "--shots 1",
    "combine": "--deltas bias",
    "scale": f"--backbones {_NANO}",
    "pretrain": "--tasks {configs}/demo.yaml",
}
_COMMON = {  # options of all of them
    "--seeds 1 1": "--seeds has 1 twice",
    "--seeds -1": "-1 is not a whole number from 0 to 4294967295",
    "--halving 1": "1 is not a whole number of at least 2",
    "--widen 0": "0 is not a whole number of at least 1",
    "--grid nothere.yaml": "No config nothere.yaml",
    "--serial --workers 3": "--workers has no effect with --serial",
    "--serial --cpus-per-trial 1": "--cpus-per-trial has no effect with --serial",
    "--serial --gpus-per-trial 1": "--gpus-per-trial has no effect with --serial",
    "--serial --address auto": "--address has no effect with --serial",
}

ROWS = [
    *(
        Row(f"{command} {_DEMO} --out out {needs} {flags}", "an option of experiments", says)
        for command, needs in _COMMANDS.items()
        for flags, says in _COMMON.items()
    ),
    Row(f"{_SWEEP} --seeds 4294967296", "beyond the seeds", "is not a whole number from 0 to"),
    Row(f"{_SWEEP} --seeds x", "text", "invalid whole number value: 'x'"),
    Row(f"{_SWEEP} --seed 3", "a name that is not whole", "did you mean --seeds?"),
    Row(f"{_SWEEP} stray", "a stray word", "unrecognized arguments: stray"),
    Row(f"{_SWEEP} --model.base_lr 0.5", "in the grid", "no effect: the experiment sets it to 0.01 and 0.04"),
    Row(f"{_SWEEP} --seed_everything 3", "follows the seeds", "no effect: the experiment sets it to 1"),
    Row(f"{_SWEEP} --trainer.max_epochs null", "no end", "give trainer.max_epochs or max_steps"),
    Row(f"{_SWEEP} --trainer.barebones true", "no record", "trainer.barebones is of `vpt fit`"),
    Row(f"{_SWEEP} --ckpt_path x", "a checkpoint", "--ckpt_path is of `vpt fit`"),
    Row(f"sweep {_RUN}", "no grid", "needs --grid FILE"),
    Row(f"sweep {_RUN} --grid nan.yaml", "NaN", "Expected a number, got NaN."),
    Row(f"sweep {_RUN} --grid list.yaml", "a list", "list.yaml is no config: it holds a list"),
    Row(f"sweep {_RUN} --grid latin1.yaml", "Latin-1", "latin1.yaml is not YAML"),
    Row(f"{_ON_RAY} --workers 0", "none", "0 is not a whole number of at least 1"),
    Row(f"{_ON_RAY} --cpus-per-trial 0", "none", "0 is not a whole number of at least 1"),
    Row(f"{_ON_RAY} --gpus-per-trial nan", "NaN", "nan is not a number of at least 0"),
    Row(f"{_ON_RAY} --gpus-per-trial -1", "below none", "-1 is not a number of at least 0"),
    Row(f"fewshot {_RUN} --shots 2 2", "one number twice", "--shots has 2 twice"),
    Row(f"fewshot {_RUN} --shots 0", "none", "0 is not a whole number of at least 1"),
    Row(f"fewshot {_RUN} --shots 2.5", "half an image", "invalid whole number value: '2.5'"),
    Row(f"fewshot {_RUN} --shots 2 --halving 2", "no grid", "give --grid FILE"),
    Row(f"fewshot {_RUN} --shots 2 --widen 2", "no grid", "give --grid FILE"),
    Row(f"fewshot {_RUN} --shots 2 --ensemble", "no grid", "averages over a grid"),
    Row(f"fewshot {_RUN} --shots 2 --data.shots 4", "overruled", "--data.shots 4 has no effect"),
    Row(f"combine {_RUN}", "no deltas", "needs --deltas"),
    Row(f"combine {_RUN} --deltas biass", "an unknown name", "did you mean 'bias'?"),
    Row(f"combine {_RUN} --deltas bias bias", "one twice", "deltas with different names"),
    Row(f"combine {_RUN} --deltas [1]", "a list", "A part of a delta is a dict"),
    Row(f"combine {_RUN} --deltas '{{{{name: lora, scale: .nan}}}}'", "NaN", "must be a number or null, got nan"),
    Row(f"combine {_RUN} --deltas '{{{{name: lora'", "no YAML", "is not YAML"),
    Row(f"scale {_RUN} --backbones nonsense", "an unknown name", "Unknown backbone 'nonsense'"),
    Row(f"scale {_RUN} --backbones {_NANO} {_NANO}", "one twice", "--backbones has vit_nano_patch8_64 twice"),
    Row(f"scale {_RUN} --backbones {_NANO} --weights-of MISSPELT=file", "a name", "is of none of the --backbones"),
    Row(f"scale {_RUN} --backbones {_NANO} --weights-of {_NANO}", "no file", "is of none of the --backbones"),
    Row(f"scale {_RUN} --backbones {_NANO} --weights-of {_NANO}=nothere", "no file", "there is no file nothere"),
    Row(f"scale {_RUN} --backbones {_NANO} --model.backbone x", "overruled", "--model.backbone x has no effect"),
    Row(f"pretrain {_RUN} --tasks nothere.yaml", "no file", "No config nothere.yaml"),
    Row(f"pretrain {_RUN} --tasks list.yaml", "a list", "list.yaml is no config"),
    Row(f"pretrain {_RUN} --tasks {{configs}}/demo.yaml", "one task", "needs at least two tasks"),
    Row("attention --delta {delta} --kind share --images ''", "no name", "an empty argument after --images"),
    Row("attention --delta {delta} --images a.png a.png", "one twice", "twice: name each once"),
    Row("transfer nothere --serial --out out", "no run", "nothere is no run: it has no run.json"),
    Row("transfer {run} {run} --serial --out out", "one twice", "twice: name each once"),
    Row("transfer {run} --out out --mode init init", "one twice", "--mode has init twice"),
    Row("transfer {run} --out out --mode some", "an unknown mode", "invalid choice: 'some'"),
    Row("transfer {run} --out out --serial --mode frozen", "no trials", "--serial has no effect with --mode frozen"),
    Row("transfer {run} --out out --serial --workers 2", "one at a time", "--workers has no effect with --serial"),
    Row("transfer {run} --out out --serial --cpus-per-trial 2", "one at a time", "no effect with --serial"),
    Row("transfer {run} --out out --serial --gpus-per-trial 2", "one at a time", "no effect with --serial"),
    Row("transfer {run} --out out --serial --address auto", "one at a time", "no effect with --serial"),
    Row("transfer {run} --out out --workers x", "text", "invalid whole number value: 'x'"),
    Row("robustness reprot", "an unknown action", "invalid choice: 'reprot'"),
    Row("robustness run --delta nothere", "no file", "No delta file nothere"),
    Row("robustness run --delta {run}/config.yaml", "no delta file", "is not a delta file"),
    Row("robustness run --delta {delta} {delta}", "one twice", "twice: name each once"),
    Row("robustness run --delta {delta} --seed 3", "no draw", "--seed has no effect without --max-images"),
    Row("robustness run --delta {delta} --max-images 0", "none", "0 is not a whole number of at least 1"),
    Row(f"{_EVALUATE} --max-image 3", "a name that is not whole", "did you mean --max-images?"),
    Row(f"{_EVALUATE} --seed -1", "below none", "-1 is not a whole number of at least 0"),
    Row(f"{_EVALUATE} --data nothere.yaml", "no file", "No config nothere.yaml"),
    Row(f"{_EVALUATE} --data latin1.yaml", "Latin-1", "latin1.yaml is not YAML"),
    Row(f"{_EVALUATE} --data.batch_sise 3", "an unknown name", "'batch_sise' is not accepted"),
    Row(f"{_EVALUATE} --anchor nothere", "no file", "No delta file nothere"),
    Row(f"{_EVALUATE} --start nothere", "no file", "No delta file nothere"),
    Row(f"{_EVALUATE} --weights nothere", "no file", "No weights file nothere"),
    Row(f"{_EVALUATE} --alphas nan", "NaN", "nan is not a number from 0 to 1"),
    Row(f"{_EVALUATE} --alphas 1.5", "beyond 1", "1.5 is not a number from 0 to 1"),
    Row(f"{_EVALUATE} --alphas 0 0", "one twice", "--alphas has 0.0 twice"),
    Row(f"{_EVALUATE} --severities 9", "beyond 5", "9 is not a whole number from 1 to 5"),
    Row(f"{_EVALUATE} --severities 1 1", "one twice", "--severities has 1 twice"),
    Row(f"{_EVALUATE} --severities --corruptions fog", "no severity", "--corruptions has no effect"),
    Row(f"{_EVALUATE} --corruptions fog fog", "one twice", "--corruptions has fog twice"),
    Row(f"{_EVALUATE} --corruptions all basic fgo", "an unknown name", "Unknown corruption 'fgo': did you mean 'fog'"),
    Row(f"{_EVALUATE} --batch-size 0", "none", "0 is not a whole number of at least 1"),
    Row("robustness report nothere", "no folder", "nothere holds no evaluation"),
    Row("robustness report {run} {run}", "one twice", "twice: name each once"),
    Row("robustness report {run} --data.root x", "no data", "unrecognized arguments: --data.root"),
    Row("robustness compare nothere", "no folder", "nothere holds no evaluation"),
    Row("robustness compare {run} {run}", "one twice", "twice: name each once"),
    Row(f"{_HEAD} --backbone nonsense", "an unknown name", "Unknown backbone 'nonsense'"),
    Row(f"{_HEAD} --weights nothere", "no file", "No weights file nothere"),
    Row(f"{_HEAD} --data nothere.yaml", "no file", "No config nothere.yaml"),
    Row(f"{_HEAD} --classes nothere", "no file", "nothere is not a JSON list"),
    Row(f"{_HEAD} --classes list.yaml", "no JSON", "list.yaml is not a JSON list"),
    Row(f"{_HEAD} --clip a b --classes c", "of another head", "--classes has no effect with --clip"),
    Row(f"{_HEAD} --templates t", "of another head", "--templates has no effect without --clip"),
    Row(f"{_HEAD} --clip a b --templates nothere", "no file", "No templates nothere"),
    Row(f"{_SOUP} --data nope.yaml", "no validation", "--data has no effect without --greedy"),
    Row(f"{_SOUP} --data.root nope", "no validation", "--data.root has no effect without --greedy"),
    Row(f"{_SOUP} --batch-size 3", "no validation", "--batch-size has no effect without --greedy"),
    Row(f"{_SOUP} --weights nope", "no validation", "--weights has no effect without --greedy"),
    Row(f"{_SOUP} --gredy", "an unknown name", "did you mean --greedy?"),
    Row(f"{_SOUP} --anchor {{delta}}", "no start", "--anchor has no effect without --stock"),
    Row(f"{_SOUP} --stock --weights nope", "no file", "No delta file other.safetensors"),
    Row(f"{_SOUP} --stock --batch-size 3", "no validation", "--batch-size has no effect with --stock"),
    Row(f"{_SOUP} --stock --greedy", "two rules", "--greedy and --stock are two rules"),
    Row(f"{_EVALUATE} --strengths x", "text", "Strengths are numbers from 0 to 1 or one file, got x"),
    Row(f"{_EVALUATE} --strengths list.yaml", "no JSON", "list.yaml"),
    Row(f"{_EVALUATE} --strengths 0 1 2", "too many", "between 0 (backbone)"),
    Row(f"{_EVALUATE} --strengths 0 0.5 1", "too few", "one for each of the 8 layers"),
    Row(f"{_EVALUATE} --adapt sar", "an unknown name", "invalid choice: 'sar'"),
    Row(f"{_EVALUATE} --adapt foa --alphas 0.5", "of α = 1", "--alphas has no effect with --adapt"),
    Row(f"{_EVALUATE} --adapt foa --batch-size 1", "no statistics", "batches of several images"),
    Row("export --delta {delta} --format torch --strengths x", "text", "Strengths are numbers from 0 to 1"),
    Row("export --delta {delta} --format torch --anchor {delta}", "of strengths", "no effect without --strengths"),
    Row(f"{_LEARN} --evaluations 3", "too few", "3 is not a whole number of at least 12"),
    Row(f"{_LEARN} --objective auc", "an unknown name", "invalid choice: 'auc'"),
    Row(f"{_LEARN} --max-images 0", "none", "0 is not a whole number of at least 1"),
    Row(f"{_LEARN} --batch-size 0", "none", "0 is not a whole number of at least 1"),
    Row(f"{_LEARN} --seed -1", "below 0", "-1 is not a whole number of at least 0"),
    Row(f"{_LEARN} --seed 4294967296", "beyond the seeds", "seed"),
    Row(f"{_LEARN} --anchor nothere", "no file", "No delta file nothere"),
    Row(f"{_LEARN} --data nothere.yaml", "no file", "No config nothere.yaml"),
    Row("robustness strengths --delta nothere", "no file", "No delta file nothere"),
    Row(_SOUP, "no file", "No delta file other.safetensors"),
    Row("robustness soup --deltas {delta} --out s", "one alone", "at least two delta files"),
    Row("attention --delta nothere", "no file", "No delta file nothere"),
    Row(f"{_ATTEND} --weights nothere", "no file", "No weights file nothere"),
    Row(f"{_ATTEND} --data list.yaml", "a list", "list.yaml is no config"),
    Row(f"{_ATTEND} --images nothere", "no file", "No image nothere"),
    Row(f"{_ATTEND} --images nothere --data.root nope", "no data", "--data.root has no effect with --images"),
    Row(f"{_ATTEND} --images nothere --data nope.yaml", "no data", "--data has no effect with --images"),
    Row(f"{_ATTEND} --out x.png --format svg", "two formats", "--format has no effect beside --out x.png"),
    Row(f"{_ATTEND} --format gif", "an unknown format", "invalid choice: 'gif'"),
    Row(f"{_ATTEND} --kind all shar", "an unknown name", "Unknown kind of figure 'shar': did you mean 'share'?"),
    Row(f"{_ATTEND} --kind share share", "one twice", "--kind has share twice"),
    Row(f"{_ATTEND} --kind all --out all.png", "one file for all", "give a folder for several"),
    Row(f"{_ATTEND} --imags x", "an unknown name", "did you mean --images?"),
    Row("profile", "no config", "needs a config"),
    Row("profile --run nothere", "no run", "nothere is no run"),
    Row("profile --run {run} --batch 3", "nothing to measure", "--batch has no effect without a config"),
    Row("profile --run {run} --classes 3", "nothing to measure", "--classes has no effect without a config"),
    Row(f"profile {_DEMO} --classes 3 --model.num_classes 9", "two numbers", "contradicts model.num_classes"),
    Row(f"profile {_DEMO} --classes 3 --data.train x", "no data", "--data.train has no effect with --classes"),
    Row(f"profile {_DEMO} --classes 1", "one class", "num_classes is 1"),
    Row(f"profile {_DEMO} --batch 0", "none", "0 is not a whole number of at least 1"),
    Row(f"profile {_DEMO} --rounds nan", "NaN", "invalid whole number value: 'nan'"),
    Row(f"profile {_DEMO} --bacth 3", "an unknown name", "did you mean --batch?"),
]
