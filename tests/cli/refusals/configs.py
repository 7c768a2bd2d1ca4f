"""Configs, checkpoints, and values of trainer, model and data that `vpt fit` and its sisters refuse."""

from __future__ import annotations

from pathlib import Path

import torch

from . import Row

_DEMO = "-c {configs}/demo.yaml"
_FIT = f"fit {_DEMO} --trainer.max_epochs 1 --trainer.limit_train_batches 1 --data.batch_size 2"
_DELTAS = f"fit {_DEMO} -c {{configs}}/method/lora.yaml --model.deltas"

# file -> (its bytes, what is wrong with it, what the answer says of it)
_FILES: dict[str, tuple[bytes, str, str]] = {
    "utf16.yaml": ("trainer: {max_epochs: 1}".encode("utf-16"), "UTF-16", "it is not text in UTF-8"),
    "latin1.yaml": (b"# na\xefve\n", "Latin-1", "it is not text in UTF-8"),
    "binary.yaml": (bytes(range(256)), "binary", "it is not text in UTF-8"),
    "nul.yaml": (b"trainer: {max_epochs: 1}\0\n", "a NUL", "unacceptable character #x0000"),
    "cyclic.yaml": (b"trainer: &a\n  logger: *a\n", "a mapping in itself", "in line 1 contains itself"),
    "list_in_itself.yaml": (b"&a [*a]\n", "a list in itself", "in line 1 contains itself"),
    "laughs.yaml": (
        b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 10)) for n in range(97, 103)),
        "ten million values",
        "repeats others more than 100,000 times",
    ),
    "empty.yaml": (b"", "empty", "it holds nothing"),
    "comment.yaml": (b"# nothing\n", "a comment alone", "it holds nothing"),
    "list.yaml": (b"- a\n- b\n", "a list", "it holds a list"),
    "scalar.yaml": (b"42\n", "a scalar", "it holds a single value"),
    "numbers.yaml": (b"1: 2\n", "a key that is a number", "1 is no name"),
    "tabs.yaml": (b"trainer:\n\tmax_epochs: 1\n", "tabs", "cannot start any token in line 2"),
    "several.yaml": (b"a: 1\n---\na: 2\n", "several documents", "another document in line 2"),
    "twice.yaml": (b"trainer: {}\ntrainer: {}\n", "a key twice", "'trainer' is given twice, in lines 1 and 2"),
    "open.yaml": (b"trainer: {max_epochs: 1\n", "a bracket that is not closed", "in line 2"),
    "code.yaml": (b"trainer: !!python/object/apply:os.getcwd []\n", "code", "could not determine a constructor"),
    "deep.yaml": (b"[" * 3000 + b"]" * 3000, "nested 3,000 times", "exceeded maximum nesting depth"),
    "digits.yaml": (b"a: " + b"9" * 5000, "a number of 5,000 digits", "a value that cannot be read"),
}
_SECTIONS = {  # of YAML that is read, and means nothing
    "trainer: [1]": "trainer holds a list",
    "model: [1]": "Not a valid subclass of TuningTask",
    "model: hello": "Unknown class 'hello'",
    "trainner: {max_epochs: 1}": "does not accept option 'trainner.max_epochs', did you mean trainer.max_epochs?",
    "data: {class_path: DigitsDataModule, init_args: {sise: 3}}": "'sise' is not accepted",
    "seed_everything: -3": "seed_everything must be a whole number of at least 0, got -3",
    "model: {init_args: {base_lr: .inf}}": "model.base_lr is inf",
}


def files(here: Path) -> None:
    """Makes what the rows name."""
    for name, (content, _, _) in _FILES.items():
        (here / name).write_bytes(content)
    for number, text in enumerate(_SECTIONS):
        (here / f"section{number}.yaml").write_text(text)
    tensors = {"model.head.weight": torch.zeros(2)}
    loaded = {
        "tensor.ckpt": torch.zeros(2),
        "foreign.ckpt": {"state_dict": tensors, "hyper_parameters": {"lr": 1}, "loops": {}},
        "odd.ckpt": {"state_dict": [1], "hyper_parameters": [1], "backbone": [1]},
        "elsewhere.ckpt": {"state_dict": tensors, "hyper_parameters": {}, "backbone": {"name": "resnet"}},
    }
    for name, value in loaded.items():
        torch.save(value, here / name)
    (here / "text.ckpt").write_text("hello")
    (here / "empty.ckpt").touch()
    (here / "folder.ckpt").mkdir()


_VALUES = {  # flags after those of a run that would be trained
    "--data.batch_size 99999999999999999999": "batch_size must be a whole number from 1 to 1000000",
    f"--data.batch_size 1{'0' * 400}": "batch_size must be a whole number from 1 to 1000000",
    "--data.num_workers 100000": "num_workers must be a whole number from 0 to 1024",
    "--model.base_lr 1e300": "base_lr must be a number from 0 to 1e+38",
    "--trainer.callbacks '[{{class_path: EarlyStopping, init_args: {{monitor: nope}}}}]'": "watches nope, which is not",
    "--trainer.num_nodes 2": "trainer.num_nodes is 2, but nothing says where the others are",
    "--trainer.max_time 00:00:00:00": "trainer.max_time is over at once",
    "--trainer.default_root_dir '~/x'": "name a folder of this machine, written out",
    "--trainer.default_root_dir s3://bucket/x": "name a folder of this machine, written out",
    "--trainer.default_root_dir ''": "name a folder of this machine, written out",
    "--trainer.accelerator tpu": "torch_xla",
    "--trainer.precision transformer-engine": "transformer_engine",
    "--trainer.max_epochs -1": "trainer.max_epochs must be a whole number of at least 1, got -1",
    "--trainer.max_epochs 0": "trainer.max_epochs must be a whole number of at least 1, got 0",
    "--trainer.max_epochs null": "give trainer.max_epochs or max_steps",
    "--trainer.max_epochs 1.5": "trainer.max_epochs: Expected a whole number",
    "--trainer.max_epoch 3": "did you mean trainer.max_epochs?",
    "--max_epochs 3": "did you mean trainer.max_epochs?",
    "--trainer.max_steps 0": "vpt fit has nothing to do",
    "--trainer.max_steps -5": "trainer.max_steps must be a whole number of at least -1, got -5",
    "--trainer.min_epochs 5": "trainer.min_epochs is 5, more than trainer.max_epochs, 1",
    "--trainer.min_steps 5 --trainer.max_steps 2": "trainer.min_steps is 5, more than trainer.max_steps, 2",
    "--trainer.max_time soon": "not a valid duration",
    "--trainer.accumulate_grad_batches 0": "trainer.accumulate_grad_batches must be a whole number of at least 1",
    "--trainer.accumulate_grad_batches 2": "Set data.batch_size to the images of a whole step",
    "--trainer.check_val_every_n_epoch 0": "trainer.check_val_every_n_epoch must be a whole number of at least 1",
    "--trainer.val_check_interval 0": "trainer.val_check_interval is 0, which says nothing",
    "--trainer.val_check_interval 2.5": "invalid value 2.5 for val_check_interval",
    "--trainer.log_every_n_steps -1": "trainer.log_every_n_steps must be a whole number of at least 0",
    "--trainer.num_sanity_val_steps -7": "trainer.num_sanity_val_steps must be a whole number of at least -1",
    "--trainer.num_nodes 0": "trainer.num_nodes must be a whole number of at least 1",
    "--trainer.limit_train_batches 0": "vpt fit has nothing to do",
    "--trainer.limit_train_batches -1": "trainer.limit_train_batches must be a number of at least 0",
    "--trainer.limit_val_batches 1.5": "invalid value 1.5 for limit_val_batches",
    "--trainer.limit_test_batches .nan": "trainer.limit_test_batches is nan",
    "--trainer.overfit_batches -1": "invalid value -1 for overfit_batches",
    "--trainer.fast_dev_run -1": "fast_dev_run=-1 is not a valid configuration",
    "--trainer.barebones true": "trainer.barebones leaves nothing",
    "--trainer.gradient_clip_val -1": "trainer.gradient_clip_val must be a number of at least 0",
    "--trainer.gradient_clip_val 0": "trainer.gradient_clip_val is 0, which says nothing",
    "--trainer.gradient_clip_val .inf": "trainer.gradient_clip_val is inf",
    "--trainer.gradient_clip_algorithm norm": "no effect without trainer.gradient_clip_val",
    "--trainer.devices 0": "trainer.devices must be a whole number of at least 1, got 0",
    "--trainer.devices 9999": "trainer.devices must be a whole number from 1 to",
    "--trainer.devices -2 --trainer.accelerator cpu": "should be an int > 0",
    "--trainer.accelerator abacus": "invalid accelerator name",
    "--trainer.strategy nonsense": "invalid strategy name",
    "--trainer.precision nonsense": "Expected one of",
    "--trainer.profiler nonsense": "it can only be one of",
    "--trainer.logger nonsense": "Unknown class 'nonsense'",
    "--trainer.callbacks nonsense": "Unknown class 'nonsense'",
    "--trainer nonsense": "Unable to load config",
    "--seed_everything -1": "seed_everything must be a whole number of at least 0, got -1",
    "--seed_everything 4294967296": "seed_everything must be a whole number from 0 to 4294967295",
    "--seed_everything 1.5": "seed_everything: Expected true or false",
    "--model nonsense": "Unknown class 'nonsense'",
    "--model.num_token 3": "'num_token' is not accepted, did you mean num_tokens?",
    "--modle.num_tokens 3": "did you mean model.num_tokens?",
    "--model.num_tokens 0": "num_tokens must be at least 1, got 0",
    "--model.num_tokens 1000000000000": "must be at most 65,536",
    "--model.dropout 2": "Prompt dropout must lie in [0, 1), got 2.0",
    "--model.dropout_mode key_value": "no effect without model.dropout",
    "--model.optimizer lion": "Expected one of 'sgd', 'adamw', got lion.",
    "--model.base_lr nan": "Expected a number, got nan.",
    "--model.base_lr .nan": "model.base_lr is nan, where a finite number is wanted",
    "--model.base_lr 1e999": "model.base_lr is inf",
    "--model.base_lr -1": "base_lr must be a number of at least 0, got -1.0",
    "--model.base_lr 0": "base_lr is positive",
    "--model.weight_decay -1": "weight_decay must be a number of at least 0, got -1.0",
    "--model.momentum 0.5": "--model.momentum has no effect without model.optimizer sgd",
    "--model.momentum 5 --model.optimizer sgd": "warmup and momentum lie in [0, 1)",
    "--model.warmup 3": "warmup and momentum lie in [0, 1)",
    "--model.micro_batch 0": "micro_batch must be a whole number of at least 1",
    "--model.image_size -64": "image_size must be a whole number of at least 1",
    "--model.num_classes 1": "model.num_classes is 1, but the data 'digits' has 10",
    "--model.backbone vit_nano_patch8": "did you mean 'vit_nano_patch8_64'?",
    "--model.weights nothere": "No weights file nothere",
    "--model.weights random:-1": "with a whole number N as seed",
    "--model.pool nonsense": "cannot pool by 'nonsense'",
    "--model.normalization nonsense": "model.normalization is 'nonsense'",
    "--model.init_delta nothere": "nothere",
    "--model.init_head nothere": "nothere",
    "--data nonsense": "Unknown class 'nonsense'",
    "--data.batch_sise 3": "'batch_sise' is not accepted, did you mean batch_size?",
    "--data.train nothing": "Unknown list 'nothing'",
    "--data.preset nothing": "Unknown preset 'nothing'",
    "--data.augment nothing": "Unknown augmentation 'nothing'",
    "--data.augment []": "got an empty list",
    "--data.augment [3]": "data.augment: Expected text or a list of mappings, got 3",
    "--data.augment '[{{p: 1}}]'": "augment is a name, or a list of transforms, e.g. [{name: D4}]",
    "--data.augment '[{{name: HorizontalFlp}}]'": "Unknown transform 'HorizontalFlp': did you mean 'HorizontalFlip'?",
    "--data.augment '[{{name: D4, q: 1}}]'": "Unknown argument of transform 'D4' 'q'",
    "--data.augment '[{{name: D4, p: 2}}]'": "Transform 'D4' is refused: p: Input should be less than or equal to 1",
    "--data.augment '[{{name: D4, p: .nan}}]'": "data.augment.0.p is nan",
    "--data.augment '[{{name: RandomCrop, height: 8, width: 8}}]'": "make uint8 (8, 8, 3) of an image, where uint8",
    "--data.augment '[{{name: Normalize}}]'": "leave normalisation to the backbone",
    "--data.image_size 64.5": "Expected a whole number",
    "--data.image_size 63": "no whole number of vit_nano_patch8_64's patches",
    "--data.batch_size 0": "batch_size must be a whole number of at least 1, got 0",
    "--data.num_workers -1": "num_workers must be a whole number of at least 0, got -1",
    "--data.seed -1": "seed must be a whole number of at least 0, got -1",
    "--data.shots 2.5": "data.shots: Expected a whole number",
    "--data.shots 0": "shots must be a whole number of at least 1, got 0",
    "--data.shots 1000000": "take at most",
    "--data.shots 2 --data.fraction 0.5": "Give either shots or fraction",
    "--data.fraction 2": "it must lie in (0, 1]",
    "--data.fraction .nan": "data.fraction is nan",
    "--data.subset_seed 3": "--data.subset_seed has no effect without data.shots or data.fraction",
    "-c {configs}/method/linear.yaml --model.l2 0.5": "--model.l2 has no effect without model.solver lbfgs",
    "-c {configs}/method/linear_lbfgs.yaml --model.l2 -1": "l2 must be a number of at least 0, got -1.0",
    "-c {configs}/method/linear_lbfgs.yaml --model.l2 [0.1,.inf]": "model.l2.1 is inf",
}
_PARTS = {  # of a delta
    "{{name: lora, scale: .nan}}": "model.deltas.0.scale is nan",
    "{{name: lora, scale: 0}}": "a scale that is not 0",
    "{{name: lora, rank: -1}}": "The rank of LoRA must be at least 1, got -1",
    "{{name: lora, rank: 2.0}}": "rank of delta 'lora' must be a whole number",
    "{{name: lora, targets: [q, q]}}": "LoRA needs different targets",
    "{{name: adapter, factor: 0}}": "The factor of an adapter is 0",
    "{{name: ssf, std: -1}}": "std must be a number of at least 0, got -1.0",
    "{{name: prefix, num_tokens: 2, hidden: 10000000}}": "must be at most 65,536",
    "{{name: prompt, num_tokens: 2, dropout: 2}}": "Prompt dropout must lie in [0, 1)",
    "{{name: mlp_head, layers: 60000}}": "2 to 64 layers",
    "{{name: lorra}}": "Unknown delta 'lorra': did you mean 'lora'?",
}
_LONG = "a" * 5000
_CHECKPOINTS = {
    "best": "says of no run",
    "last": "says of no run",
    "{delta}": "is no checkpoint of a run",
    "tensor.ckpt": "is no checkpoint of a run",
    "foreign.ckpt": "is no checkpoint of a run",
    "odd.ckpt": "is no checkpoint of a run",
    "elsewhere.ckpt": "is no checkpoint of a run",
    "text.ckpt": "is not a checkpoint that torch can load",
    "empty.ckpt": "is not a checkpoint that torch can load",
    "folder.ckpt": "No checkpoint folder.ckpt",
    "nothere.ckpt": "No checkpoint nothere.ckpt",
    _LONG: "No checkpoint aaa",
}

ROWS = [
    *(Row(f"fit {_DEMO} -c {name}", wrong, f"{name}") for name, (_, wrong, _) in _FILES.items()),
    *(Row(f"fit -c {name}", wrong, says) for name, (_, wrong, says) in _FILES.items()),
    *(Row(f"fit {_DEMO} -c section{n}.yaml", text, says) for n, (text, says) in enumerate(_SECTIONS.items())),
    *(Row(f"{_FIT} {flags}", "a value that means nothing", says) for flags, says in _VALUES.items()),
    *(Row(f"{_DELTAS} '[{part}]'", "a part that means nothing", says) for part, says in _PARTS.items()),
    *(Row(f"test {_DEMO} --ckpt_path {path}", "no checkpoint", says) for path, says in _CHECKPOINTS.items()),
    Row(f"fit {_DEMO} --model utf16.yaml", "UTF-16 of a section", "utf16.yaml is not YAML"),
    Row(f"fit {_DEMO} --trainer list.yaml", "a list for a section", "list.yaml is no config"),
    Row(f"fit {_DEMO} -clist.yaml", "a list", "list.yaml is no config"),
    Row("fit -c nothere.yaml", "no file", "There is no config"),
    Row("fit -c", "no name", "expected one argument"),
    Row(f"{_DELTAS} []", "no part", "deltas is empty"),
    Row(f"fit {_DEMO} --ckpt_path foreign.ckpt", "another program's", "is no checkpoint of a run"),
    Row(f"validate {_DEMO} --ckpt_path {{delta}}", "a delta file", "is no checkpoint of a run"),
    Row(f"predict {_DEMO} --ckpt_path best", "a word of Lightning's", "says of no run"),
    Row(f"test {_DEMO}", "no checkpoint", "needs a trained model"),
    *(
        Row(
            f"{command} {_DEMO} --ckpt_path {{checkpoint}} --trainer.limit_{stage}_batches 0",
            "nothing to measure",
            f"vpt {command} has nothing to do",
        )
        for command, stage in (("validate", "val"), ("test", "test"), ("predict", "predict"))
    ),
    Row(f"test {_DEMO} --ckpt_path {{checkpoint}} --model.deep false", "another model", "was trained with True"),
]
