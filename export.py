"""Write a trained model as a folder that the library `transformers` loads.

    python export.py out/quickstart --to=exported/quickstart

writes the weights (model.safetensors), the settings, the tokenizer in the library's own format, the model's code in one file
(modeling_tauformer.py, from hub/) and a model card. docs/export.md says how to use it, and how to measure it by lm_eval."""

import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from common import ROOT, Parser, UserError, commit, first_line, run, waiting  # isort: skip, for it tells of packages that are missing
from data import checkpoint_file
from data import tokenizer as tokenizers

CODE = ROOT / "hub" / "modeling_tauformer.py"
CLASSES = {"AutoConfig": "modeling_tauformer.TauformerConfig", "AutoModelForCausalLM": "modeling_tauformer.TauformerForCausalLM"}
SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "dropout", "attention")  # settings that are no switches
PAD_TEXT = "<|pad|>"  # of a vocabulary without an end token; its number is past those of the model


def byte_characters():
    """The character that stands for each byte in the library's byte-level vocabularies (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def merge_of(token, ranks):
    """The two tokens that a token is merged from: what is left of its bytes after all merges of lower rank. None where more are left:
    no text leads to such a token but one that it is the whole word of."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1))
        if rank >= ranks[token]:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def library_tokenizer(tokenizer):
    """A tokenizer of data/tokenizer.py as one of the library `tokenizers`. Raises ValueError where it would give other tokens, and what
    the library raises for a pattern that it cannot read."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if tokenizer.kind == "char":
        more = {PAD_TEXT: len(tokenizer.tokens)} if tokenizer.end_token is None else {tokenizers.END_TEXT: tokenizer.end_token}
        vocabulary = tokenizer.id_of | more
        library = Tokenizer(models.WordLevel(vocabulary, unk_token=""))  # a character that it lacks is an error, as it is here
        library.pre_tokenizer, library.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    else:
        if tokenizers.END_TEXT in tokenizer.tokens:
            raise ValueError(f"it has an ordinary token {tokenizers.END_TEXT!r} too")
        characters = byte_characters()
        written = lambda token: "".join(characters[byte] for byte in token)
        ranks = {token: rank for rank, token in tokenizer.bytes_of.items() if rank != tokenizer.end_token}
        merges = [merge for token in sorted(ranks, key=ranks.get) if len(token) > 1 and (merge := merge_of(token, ranks))]
        vocabulary = {written(token): rank for token, rank in ranks.items()} | {tokenizers.END_TEXT: tokenizer.end_token}
        merges = [(written(left), written(right)) for left, right in merges]
        library = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
        blanks = rf"[^\S\r\n]{{{tokenizers.RUN}}}(?=[^\S\r\n])"  # where data.tokenizer.parts() cuts
        pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", tokenizer.pattern)  # {1,3}+ repeats in this library, where tiktoken takes what it can
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(blanks), "isolated"),
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(PAD_TEXT if tokenizer.end_token is None else tokenizers.END_TEXT, normalized=False)])
    library.encode_special_tokens = True  # they are plain text in a text, as they are here
    text = "".join(tokenizer.tokens) if tokenizer.kind == "char" else tokenizers.PROBE
    if library.encode(text).ids != tokenizer.encode(text):
        raise ValueError("it would give other tokens")
    return library


def tokenizer_files(tokenizer, block_size):
    """{name: text} of the tokenizer's files. Raises UserError for a tokenizer that the library cannot express."""
    try:
        library = library_tokenizer(tokenizer)
    except ModuleNotFoundError:
        raise UserError(f"tokenizers is not installed: pip install -r {ROOT / 'requirements-export.txt'}") from None
    except Exception as error:  # it raises nothing more special, for a regular expression that it cannot read, for example
        raise UserError(f"the run's tokenizer cannot be written in the format of the library tokenizers: {first_line(error)}") from None
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizers.END_TEXT)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"pad_token": PAD_TEXT} if tokenizer.end_token is None else end),
        "padding_side": "left",
        "model_max_length": block_size,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": library.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def config_files(config, tokenizer):
    """{name: text} of config.json, with the model's settings, and generation_config.json, which stops at no token, as sample.py does."""
    end = {} if tokenizer.end_token is None else dict.fromkeys(("bos_token_id", "pad_token_id"), tokenizer.end_token)
    settings = {"architectures": ["TauformerForCausalLM"], "model_type": "tauformer", "auto_map": CLASSES, "dtype": "float32"}
    return {
        "config.json": json.dumps(settings | asdict(config), indent=2) + "\n",
        "generation_config.json": json.dumps(end, indent=2) + "\n",
    }


def weights(model):
    """{name: tensor} by the names of model.py; "laplacian" is that of each key head, (Hkv, D, D), reduced to the head's features."""
    tensors = dict(model.state_dict()) | ({} if model.laplacian is None else {"laplacian": model.laplacian})
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- tauformer
---

# {name}

A Tauformer: a language model whose attention scores tokens by {by}, {form}.

## Use

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
    inputs = tokenizer([TEXT, TEXT], return_tensors="pt", padding=True)
    print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)))

DIR is this folder. `trust_remote_code=True` runs its `modeling_tauformer.py`, one file to read first; weights are `safetensors`. (The
tokenizer needs no code; without this argument the library asks, on a terminal, and loads it whatever the answer.) Made for transformers
{transformers}.

## Where it comes from

| | |
| --- | --- |
{table}

## Settings

The model's settings are in `config.json`. Those of the training that are not `train.py`'s defaults:

| | |
| --- | --- |
{settings}

## Limits

- It knows the text named above and no other, goes on with text of that kind, and follows no instructions. What it says may be wrong, and
  may repeat the text that it was trained on. Nothing was done about what is harmful in that text.
- It was trained at a context of {block_size:,} tokens. Positions run on beyond that, but it has not learned to use them.
- This code computes every pair of tokens, in O(T^2) time and memory; Tauformer's own operators take O(T log T).
- The temperature of sampling is an argument of `generate()`; the one in `config.json` is that of the attention.
- {tokens}
- No licence is stated here: that of the text decides.
"""


def model_card(name, model, tokenizer, header, path):
    """README.md of the folder, made of what the checkpoint holds. Raises UserError if its run's state is damaged."""
    from training.checkpoint import RunState
    from training.config import NO_RESULT, Settings, stored_settings

    config, state, settings = model.config, RunState.of(header, path), stored_settings(header, path)
    by = "the distance of their energies on a graph Laplacian (tau)" if config.attention == "tau" else "dot product (tau's twin)"
    changed = {name: value for name, value in settings.items() if value != getattr(Settings, name)}
    switches = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in SIZES and getattr(config, f.name) != f.default}
    loss = "not validated yet"
    if math.isfinite(state.best_loss):
        loss = f"{state.best_loss:.4f} nats per token, perplexity {math.exp(min(state.best_loss, 700)):.2f}, on held-out text"
        loss += "" if path.name == checkpoint_file.BEST else " (the run's best so far, which may not be this checkpoint's)"
    rows = {
        "data": f"`{settings.get('data_dir', 'unknown')}`, sha256 `{state.data}`",
        "Laplacian": f"`{settings.get('laplacian', 'unknown')}`" if config.attention == "tau" else "none",
        "weights began as": f"`{state.origin}`",
        "tokenizer": f"{tokenizer.vocab_size:,} {'tokens, byte-level BPE' if tokenizer.kind == 'bpe' else 'characters'}",
        "parameters": f"{model.parameter_count():,}",
        "trained for": f"{state.step:,} steps, {state.tokens:,} tokens, {state.elapsed_s / 60:,.1f} minutes",
        "validation loss": loss,
        "seed": settings.get("seed", "unknown"),
        "checkpoint": f"`{path.name}`, sha256 `{header['sha256']}`",
        "written by": f"`export.py`, commit {commit() or 'unknown'}",
    }
    end = (
        "`generate()` does not stop at the end of a document: `eos_token_id=tokenizer.eos_token_id` asks for that. "
        f"`{tokenizers.END_TEXT}` in a text to read is plain text."
    )
    if tokenizer.end_token is None:
        end = f"The vocabulary has no token for the end of a text; `{PAD_TEXT}` is for padding only, and is not the model's."
    return CARD.format(
        name=name,
        by=by,
        form=f"with {', '.join(f'`{name} = {value}`' for name, value in switches.items())}" if switches else "without any switch",
        transformers=re.search(r"transformers==(\S+)", (ROOT / "requirements-export.txt").read_text())[1],
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        settings="\n".join(f"| `{name}` | `{value}` |" for name, value in changed.items() if name not in NO_RESULT),
        block_size=config.block_size,
        tokens=end + (" A character that it lacks is an error." if tokenizer.kind == "char" else ""),
    )


def check_folder(to, overwrite):
    """Raise UserError unless export() may write the folder `to`."""
    if to.is_dir() and any(to.iterdir()):
        if not (to / CODE.name).is_file():
            raise UserError(f"--to={to} holds files, and none of them is {CODE.name}, which an older export has: give another folder")
        if not overwrite:
            raise UserError(f"--to={to} is not empty: give another folder, or --overwrite to replace the export in it")
    there = next(path for path in (to.resolve(), *to.resolve().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--to={to} cannot be written: {there} is a file: give another folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"--to={to} cannot be written: {there} may not be written to (permission denied): give another folder")


@contextmanager
def new_folder(to):
    """Yield a temporary folder. When the block ends well it becomes `to`, or, if that exists, its files go there, over those of the same
    names; otherwise it is removed."""
    place = to.resolve()
    existed, name = place.is_dir(), f".{place.name}.{os.getpid()}.tmp"
    temporary = place / name if existed else place.with_name(name)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if existed:
            if folder := next((place / path.name for path in temporary.iterdir() if (place / path.name).is_dir()), None):
                raise UserError(f"{folder} is a folder, where a file is to be written: give another --to")
            (place / "config.json").unlink(missing_ok=True)  # without it nothing loads, so that an end in between is seen
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(place / path.name)
        else:
            temporary.replace(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(out_dir, to, overwrite=False):
    """Write the model of an output folder of train.py, or of a checkpoint, as a folder that transformers loads, whole or not at all."""
    check_folder(to, overwrite)
    path = checkpoint_file.find(out_dir)
    from training import checkpoint  # here, so that the mistakes above are answered before torch is imported, which takes seconds

    tensors, header = checkpoint.read(path)
    model, tokenizer = checkpoint.build_model(tensors, header, path), tokenizers.from_json(header["tokenizer"])
    texts = {"README.md": model_card(to.resolve().name, model, tokenizer, header, path)}
    texts |= config_files(model.config, tokenizer) | tokenizer_files(tokenizer, model.config.block_size)
    with new_folder(to) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        shutil.copyfile(CODE, folder / CODE.name)
        checkpoint_file.save_tensors(folder / "model.safetensors", weights(model), {"format": "pt"}, to / "model.safetensors")
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which is written for the user alone


def main():
    options = Parser(__doc__)
    options.add_argument("out_dir", metavar="OUT_DIR", help="output folder of train.py, whose best checkpoint is taken, or a checkpoint")
    options.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder to write")
    options.add_argument("--overwrite", action="store_true", help="replace the export that the folder holds")
    args = options.parse_args()
    with waiting("loading the model"):
        export(args.out_dir, args.to, args.overwrite)
    print("from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"model = AutoModelForCausalLM.from_pretrained({str(args.to)!r}, trust_remote_code=True)")
    print(f"tokenizer = AutoTokenizer.from_pretrained({str(args.to)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    run(main)
