"""Training data of a few records, in memory or in a file with a cache."""

from swaa_jax.data import DataConfig, prepare_samples
from tests.support import byte_tokenizer, chat_templates

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


def build(name):
    """A tokenizer with the chat template of a family."""
    tok = byte_tokenizer.build(template=chat_templates.FAMILIES[name])
    names = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>", "<end_of_turn>"]
    tok.add_special_tokens({"extra_special_tokens": [*names, "<|end_of_sentence|>"]})
    return tok


def samples_of(tok, *records, **settings):
    """What training data makes of records."""
    config = DataConfig(seq_len=2048, batch_size=1, **settings)
    found = prepare_samples(config, tok, records=list(records))
    return [found[n] for n in range(len(found))]


def cached(tmp_path, **settings):
    """The samples of `data.jsonl`, with a cache beside it."""
    config = DataConfig(
        files=str(tmp_path / "data.jsonl"),
        seq_len=256,
        batch_size=1,
        cache_dir=str(tmp_path / "cache"),
        **settings,
    )
    return prepare_samples(config, byte_tokenizer.build())
