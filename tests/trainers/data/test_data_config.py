"""Configurations refuse what cannot work with a sentence that names the field."""

import dataclasses
import re

import pytest

from thinrank.trainers.data import FilesConfig, HuggingFaceConfig, PySourceConfig


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer": ""}, "tokenizer must be bpe, bytes, or a Hugging Face name or folder, got ''"),
        ({"vocab_size": 256}, "vocab_size must be at least 257 (256 bytes and the end-of-text token), got 256"),
        ({"tokenizer_sample_bytes": 0}, "tokenizer_sample_bytes must be at least 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"validation_fraction": 0.0}, "validation_fraction must lie between 0 and 1, both excluded, got 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1, both excluded, got 1.0"),
        ({"validation_tokens": -1}, "validation_tokens must be at least 1, or 0 for all held-out tokens, got -1"),
        ({"final_validation_unseen": True, "validation_tokens": 0}, "final_validation_unseen needs validation_tokens"),
        ({"final_validation_tokens": -2}, "final_validation_tokens must be at least 1, or 0 for all held-out tokens"),
        ({"seed": -1}, "seed must lie in [0, 2**63), got -1"),
    ],
)
def test_common_fields(change, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        PySourceConfig(**change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "train must name at least one glob pattern"),
        ({"train": "corpus/*.txt"}, "train must be a list of non-empty strings, got 'corpus/*.txt'"),
        ({"train": ["a"], "validation": [""]}, "validation must be a list of non-empty strings"),
        ({"train": ["a"], "text_field": ""}, "text_field must not be empty"),
    ],
)
def test_files_fields(change, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        FilesConfig(**change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"path": ""}, "path must not be empty"),
        ({"split": "x", "validation_split": "x"}, "validation_split must differ from split, got 'x' for both"),
        ({"validation_data_files": ["a"]}, "validation_data_files needs data_files, got none"),
        ({"shuffle_buffer": -1}, "shuffle_buffer must be at least 0, got -1"),
    ],
)
def test_hugging_face_fields(change, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        HuggingFaceConfig(**change)


def test_a_vocabulary_of_bytes_needs_no_vocab_size():
    assert PySourceConfig(tokenizer="bytes", vocab_size=1).vocab_size == 1


@pytest.mark.parametrize("kind", [PySourceConfig, FilesConfig, HuggingFaceConfig])
def test_every_field_says_what_it_means(kind):
    for field in dataclasses.fields(kind):
        assert field.metadata["help"], field.name
        assert "\n" not in field.metadata["help"]


@pytest.mark.parametrize("kind", [PySourceConfig, FilesConfig, HuggingFaceConfig])
def test_configurations_are_structured_for_omegaconf(kind):
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(OmegaConf.structured(kind))
    assert isinstance(tree, dict)
    assert set(tree) == {field.name for field in dataclasses.fields(kind)}
    assert tree["cache_dir"] is None
