"""Under Lightning: no warning, no sampler put in, one endless epoch, exact resume in the middle of it."""

import lightning as L
import pytest
import torch

from thinrank.trainers.data import HuggingFaceConfig, PySourceConfig, TextData

pytestmark = pytest.mark.filterwarnings(
    # Lightning's flattening of loaders builds a LeafSpec, which torch 2.13 announces to change; not ours to repair.
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
)


class Recorder(L.LightningModule):
    """Keeps what it is given, and reports finished steps to the data as a training module does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows, self.validated = [], 0

    def training_step(self, batch, batch_idx):
        self.rows.append(batch["input_ids"])
        self.position = batch["position"]
        return self.weight * 0.0

    def optimizer_step(self, *args, **kwargs):
        # Before the callbacks' on_train_batch_end, where a checkpoint may be written.
        super().optimizer_step(*args, **kwargs)
        self.trainer.datamodule.advance(self.position)

    def validation_step(self, batch, batch_idx):
        self.validated += int((batch["labels"] >= 0).sum())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(params=["pysource", "hf"])
def make(request, python_folder, c4_folder, tmp_path):
    fields = {"tokenizer": "bytes", "sequence_length": 16, "cache_dir": str(tmp_path / "cache")}
    if request.param == "pysource":
        config = PySourceConfig(folder=str(python_folder), validation_tokens=2000, **fields)
    else:
        files = {"data_files": [f"{c4_folder}/c4-train*"], "validation_data_files": [f"{c4_folder}/c4-validation*"]}
        config = HuggingFaceConfig(path="json", **files, **fields)
    return lambda: TextData(config, batch_size=4)


def trainer(tmp_path, steps, **options):
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        default_root_dir=tmp_path,
        **options,
    )


class SaveAfter(L.Callback):
    """Writes one checkpoint after a step, while training goes on."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_in_the_middle_of_the_epoch(make, tmp_path, accumulate):
    """The loader has read ahead of the checkpoint by then; none of the rows may be lost or seen twice."""
    straight = Recorder()
    save = SaveAfter(7, tmp_path / "x.ckpt")
    trainer(tmp_path, 12, accumulate_grad_batches=accumulate, callbacks=[save]).fit(straight, datamodule=make())
    second, data = Recorder(), make()
    resumed = trainer(tmp_path, 12, accumulate_grad_batches=accumulate)
    resumed.fit(second, datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert data.consumed == 12 * 4
    assert len(straight.rows) == 12 * accumulate
    assert len(second.rows) == 5 * accumulate
    assert torch.equal(torch.cat(second.rows), torch.cat(straight.rows[7 * accumulate :]))
    assert resumed.fit_loop.epoch_progress.total.started == 1
    assert straight.validated > 0


def test_the_trainers_accumulation_divides_the_global_batch(make, tmp_path):
    together, divided = Recorder(), Recorder()
    trainer(tmp_path, 3).fit(together, datamodule=make())
    trainer(tmp_path, 3, accumulate_grad_batches=4).fit(divided, datamodule=make())
    assert {rows.shape for rows in together.rows} == {(4, 16)}
    assert {rows.shape for rows in divided.rows} == {(1, 16)}
    assert torch.equal(torch.cat(together.rows), torch.cat(divided.rows))


def test_the_last_validation_sees_all_held_out_tokens(make, tmp_path):
    model, data = Recorder(), make()
    trainer(tmp_path, 1).test(model, datamodule=data, verbose=False)
    assert model.validated == data.manifest["validation"]["tokens"]


def test_a_batch_that_the_trainer_cannot_divide(make, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size must be divisible by 3 .* got 4; set it to 3 or 6"):
        trainer(tmp_path, 1, accumulate_grad_batches=3).fit(Recorder(), datamodule=make())


def test_micro_batches_that_contradict_the_trainer(make, tmp_path):
    data = TextData(make().config, batch_size=4, micro_batches=2)
    with pytest.raises(
        ValueError, match=r"micro_batches must equal the trainer's accumulate_grad_batches \(4\), got 2"
    ):
        trainer(tmp_path, 1, accumulate_grad_batches=4).fit(Recorder(), datamodule=data)


def test_ranks_come_from_the_trainer(make, tmp_path):
    """Lightning tells a strategy's replicas through the arguments for its sampler; those count, not all processes."""
    data = make()
    data.setup()

    class Stub:
        distributed_sampler_kwargs = {"rank": 1, "num_replicas": 2}  # noqa: RUF012 - the shape of Lightning's property
        accumulate_grad_batches = 1

    data.trainer = Stub()
    assert (data.layout().rank, data.layout().world) == (1, 2)
