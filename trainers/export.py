"""Export to the Hugging Face layout, verified by loading it back."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thinrank.trainers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = "def probe(values):\n    return [value + 1 for value in values]  # é, 你好\n"


def export(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> Path:
    """Write model and tokenizer so that `transformers` loads them by the folder alone, and prove it.

    Everything is written into a temporary folder beside the target and loaded back with `AutoModelForCausalLM` and
    `AutoTokenizer`: every weight must be equal bit for bit, the logits of a fixed input must be equal (on the CPU
    exactly, on an accelerator to a relative 1e-5 of their largest, since its kernels may differ from call to call), and
    the tokenizer must give the same ids. Only then the folder gets its name; an earlier export there is replaced,
    anything else is not.

    The model's ids of the end, beginning and padding token are set to the tokenizer's.

    Args:
        model: the trained model, whole on one device, in any mode.
        tokenizer: a `transformers` tokenizer, or None to export the model alone.
        folder: where to.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else or cannot be written.
        RuntimeError: what was written does not load back equal; nothing is left behind.
    """
    target = Path(folder)
    with replacing_folder(target, "config.json") as temporary:
        if tokenizer is not None:
            adopt_token_ids(model, tokenizer)
        with _quiet():
            model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _verify(model, tokenizer, temporary)
    return target


@contextmanager
def replacing_folder(target: Path, mark: str) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` if the block succeeds, and is gone if it does not.

    Args:
        target: where to; an earlier export there is replaced, anything else is not.
        mark: the file by which an earlier export is known.

    Raises:
        UserError: the folder holds something else or cannot be written.
    """
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / mark).is_file())):
        raise UserError(f"the export folder {target} holds something else: choose another folder or empty this one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write the export to {target} ({error.strerror}): choose a writable folder") from error
    try:
        try:
            yield temporary
        except OSError as error:
            raise UserError(
                f"cannot write the export to {target} ({error.strerror or error}): "
                f"free some space or choose another folder"
            ) from error
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already unless something failed


def adopt_token_ids(model: PreTrainedModel, tokenizer: Any) -> None:
    """Sets the model's ids of the end, beginning and padding token to the tokenizer's."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name, None)
        setattr(model.config, name, value)
        if model.generation_config is not None:
            setattr(model.generation_config, name, value)


@torch.no_grad()
def _verify(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    with _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    loaded.to(model.device)
    mine, theirs = model.state_dict(), loaded.state_dict()
    if mine.keys() != theirs.keys():
        missing = sorted(mine.keys() ^ theirs.keys())[0]
        raise RuntimeError(f"the exported model differs from the trained one: {missing} is in one of them alone")
    for name, value in mine.items():
        if not torch.equal(value, theirs[name]):
            raise RuntimeError(f"the exported model differs from the trained one: {name} did not load back equal")
    ids = (
        torch.arange(min(16, model.config.max_position_embeddings), device=model.device)[None] % model.config.vocab_size
    )
    was_training = model.training
    model.eval()
    loaded.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
        found = loaded(input_ids=ids, use_cache=False).logits.float()
    finally:
        model.train(was_training)
    worst = float((expected - found).abs().max())
    allowed = 0.0 if model.device.type == "cpu" else 1e-5 * float(expected.abs().max())
    if not worst <= allowed:
        raise RuntimeError(f"the exported model differs from the trained one: its logits are off by up to {worst:.3g}")
    if tokenizer is not None:
        same_ids(tokenizer, folder)


def same_ids(tokenizer: Any, folder: Path) -> None:
    """Raises RuntimeError unless the tokenizer that lies in `folder` gives the ids of `tokenizer`."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if again.encode(_PROBE) != tokenizer.encode(_PROBE):
        raise RuntimeError("the exported tokenizer differs from the one trained with: it gives other ids")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; an earlier export is moved aside first, because a folder with files cannot be replaced in one call."""
    if not target.exists():
        os.replace(temporary, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    os.replace(target, aside)
    os.replace(temporary, target)
    shutil.rmtree(aside)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which would sit in the middle of a report."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
