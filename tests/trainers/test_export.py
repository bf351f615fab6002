"""Export to the Hugging Face layout, and text from a model."""

from pathlib import Path

import pytest
import torch
from tiny_training import TINY, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from thinrank.trainers import export as exporting
from thinrank.trainers.callbacks.sample import sample_text
from thinrank.trainers.errors import UserError
from thinrank.trainers.export import export

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer whose ids stay below the tiny model's vocabulary for the prompts of these tests."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    common = ["Ġ", *"abcdefghijklmnopqrstuvwxyz()=:_1"]  # Ġ is the byte-level spelling of a space
    order = [END, *common, *(letter for letter in letters if letter not in common)]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(order)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


# ---- export


def test_the_export_loads_with_equal_weights_logits_and_ids(tmp_path, tokenizer):
    model = tiny_model().train()
    folder = export(model, tokenizer, tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([again.encode("def f(x):", add_special_tokens=False)])
    assert ids.tolist()[0] == tokenizer.encode("def f(x):", add_special_tokens=False)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 0
    assert loaded.config.use_cache
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_earlier_export_is_replaced_and_the_mode_is_kept(tmp_path):
    model = tiny_model(seed=1).train()
    export(tiny_model(seed=0), None, tmp_path / "export")
    (tmp_path / "export" / "old.txt").write_text("of the earlier export")
    export(model, None, tmp_path / "export")
    assert model.training
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "export" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda model: model.lm_head.weight.add_(1e-6), "lm_head.weight did not load back equal"),
        (lambda model: setattr(model.model.norm, "variance_epsilon", 1e-3), "its logits are off by up to"),
    ],
)
def test_an_export_that_does_not_load_back_equal_leaves_nothing(tmp_path, monkeypatch, damage, sentence):
    load = AutoModelForCausalLM.from_pretrained

    def damaged(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            damage(model)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", damaged)
    with pytest.raises(RuntimeError, match=f"the exported model differs from the trained one: .*{sentence}"):
        export(tiny_model(), None, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_earlier_one(tmp_path, monkeypatch):
    export(tiny_model(seed=0), None, tmp_path / "export")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = tiny_model(seed=1)
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot write the export to .* \(No space left on device\): free some space"):
        export(model, None, tmp_path / "export")
    monkeypatch.undo()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in tiny_model(seed=0).state_dict().items())


def test_the_tokenizer_is_verified_too(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(exporting, "_PROBE", "x")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Reversed())
    with pytest.raises(RuntimeError, match="the exported tokenizer differs from the one trained with"):
        export(tiny_model(), tokenizer, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


class Reversed:
    def encode(self, text):
        return [1, 2, 3]


def test_where_it_cannot_go_is_said(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="notes holds something else: choose another folder"):
        export(tiny_model(), None, tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match=r"mine\.txt/export .*: choose a writable folder"):
        export(tiny_model(), None, tmp_path / "notes" / "mine.txt" / "export")
    with pytest.raises(UserError, match=r"cannot write the export to /proc/nowhere/export"):
        export(tiny_model(), None, Path("/proc/nowhere/export"))


# ---- sampling


def test_a_sample_depends_on_the_seed_alone_and_leaves_the_global_state(tokenizer):
    model = tiny_model().train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample_text(model, tokenizer, "def ", 12, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    torch.manual_seed(2)
    assert sample_text(model, tokenizer, "def ", 12, seed=3) == first
    assert sample_text(model, tokenizer, "def ", 12, seed=4) != first
    assert first.startswith("def ")


def test_greedy_sampling_follows_the_largest_logit(tokenizer):
    model = tiny_model().eval()
    ids = tokenizer.encode("def ", add_special_tokens=False)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert 0 not in ids
    assert sample_text(model, tokenizer, "def ", 5, seed=0, temperature=0) == "def " + tokenizer.decode(ids[4:])


def test_sampling_stops_at_the_end_of_text_and_slides_past_the_window(tokenizer):
    model = tiny_model()
    long = sample_text(model, tokenizer, "a" * (TINY.max_position_embeddings + 5), 3, seed=0)
    assert len(long) > TINY.max_position_embeddings + 5
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits equal, so that greedy takes token 0, the end of text
    assert sample_text(model, tokenizer, "def ", 5, seed=0, temperature=0) == "def "


def test_an_empty_prompt_starts_like_a_document(tokenizer):
    model = tiny_model().eval()
    with torch.no_grad():
        first = int(model(input_ids=torch.tensor([[0]])).logits[0, -1].argmax())
    assert sample_text(model, tokenizer, "", 1, seed=0, temperature=0) == tokenizer.decode([first] if first else [])


def test_bad_values_are_refused_by_one_sentence(tokenizer):
    with pytest.raises(ValueError, match="temperature and max_new_tokens must be at least 0, got -1 and 3"):
        sample_text(tiny_model(), tokenizer, "def ", 3, seed=0, temperature=-1)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="prompt must not be empty"):
        sample_text(tiny_model(), endless, "", 3, seed=0)
