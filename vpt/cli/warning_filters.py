"""What third parties print that helps nobody who trains here, each with the reason to hide it."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from vpt.errors import VPTWarning

_WARNINGS = {
    r".*does not have many workers.*": "images are decoded once and then copied: worker processes only cost",
    r".*number of training batches.*smaller than the logging interval.*": "VTAB-1k has 16 steps an epoch",
    r".*Checkpoint directory .* exists and is not empty.*": "a resumed run writes where it wrote before",
    r".*The dirpath has changed from.*": "a run that goes on elsewhere: only last.ckpt is kept, none of that is used",
    r".*`LightningModule.configure_optimizers` returned `None`.*": "the head of a linear probe can be solved for",
    r".*Consider setting `persistent_workers=True`.*": "the data module sets it whenever there are workers",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*": "lightning 2.6 on torch 2.9 and later",
    r"Image size \(\d+ pixels\) exceeds limit": "Pillow decodes up to twice its limit; beyond, the file is named",
    r".*a `val_dataloader` but have no `validation_step`.*": "`vpt pretrain` does not validate on purpose",
    r"FSDP2-wrapped module .* returned a view tensor.*": "nothing here writes to what a backbone returns",
    r".*module\(s\) in eval mode at the start of training.*": "the frozen backbone is in eval mode on purpose",
}


_MESSAGES = {
    "Tip: For seamless cloud": "advertisements, which have no switch (lightning #21294)",
    "TPU available": "this package is not tested on TPUs",
    "to estimate number of stepping batches": "the schedule always needs that number",
}


class _Quiet(logging.Filter):
    """Drops the messages above."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in _MESSAGES)


def hush() -> None:
    """Hides known noise of the libraries; this package's own warnings stay, each on one line."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    warnings.showwarning = _show
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(old, _Quiet) for old in logger.filters):
        logger.addFilter(_Quiet())


_show_others = warnings.showwarning


def _show(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
    if issubclass(category, VPTWarning):
        print(f"vpt: warning: {message}", file=sys.stderr)
    else:
        _show_others(message, category, *place, **named)
