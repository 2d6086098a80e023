"""A tokenizer like Llama 2's: pieces with a mark for the space, and bytes for all other text."""

from typing import Any

PIECES = ["▁", "▁the", "▁a", "the", "a", "b", "c", ".", "▁.", "n't", "▁do", "日", "é", "▁é", "\n"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|tool|>", "<|eot_id|>"]
DECODERS = ("strip", "metaspace")


def build(decoder: str = "strip") -> Any:
    """Ids 0..4 are special (3 and 4 in `tokenizer.json` alone), then 256 bytes, then pieces.

    Args:
        decoder: "strip" as Llama 2's, which leaves out the whole text's first space; "metaspace"
            as T5's, which leaves out the first token's.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    start: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if decoder == "strip":
        tokenizer.decoder = decoders.Sequence([*start, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
        )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
