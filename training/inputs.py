"""What a run reads, looked at before torch is imported, which takes seconds: what is missing is said at once."""

import hashlib
import os
from pathlib import Path

from common import RESTARTS, UserError
from data import checkpoint_file
from data.corpus import Corpus
from data.laplacian import said_beside
from ops.model_config import ModelConfig
from training.config import model_settings, parse
from training.folder import refuse_to_replace


def asked(description):
    """(settings, given) of the command line, as parse() gives them. Raises UserError for a mistake in it, and for a corpus, Laplacian,
    checkpoint or output folder that a run by it cannot have."""
    settings, given = parse(description)
    if settings.wandb_log:
        import wandb  # noqa: F401  (so that it is known now if it is missing)
    choose_init_from(settings)
    refuse_to_replace(settings)
    if settings.eval_only and settings.init_from == "scratch":
        raise UserError("eval_only needs a trained model: give --init_from=resume or --init_from=OUT_DIR")
    if settings.init_from == "resume":  # the checkpoint says what it reads
        if not checkpoint_file.steps(settings.out_dir):
            raise UserError(f"nothing to resume: {settings.out_dir} holds no step_*.safetensors; leave --init_from=resume out")
        return settings, given
    corpus = Corpus(settings.data_dir)
    if settings.init_from == "scratch":
        ModelConfig(**model_settings(settings))
        check_laplacian_exists(settings)
        check_made_of(corpus, settings, given)
    elif settings.init_from.startswith("gpt2") and not os.path.exists(settings.init_from):
        raise UserError(f"init_from = {settings.init_from!r}: GPT-2's weights do not fit this model; give the output folder of a run")
    else:
        checkpoint_file.find(settings.init_from)
    return settings, given


def choose_init_from(settings):
    """Turn "auto" into "resume" or "scratch"; after a restart by torchrun, resume."""
    if settings.overwrite and settings.init_from in ("auto", "resume"):
        raise UserError(f"overwrite = True starts a run anew, init_from = {settings.init_from!r} goes on with it: leave one out")
    if (settings.init_from == "auto" or RESTARTS) and checkpoint_file.steps(settings.out_dir):
        settings.init_from = "resume"
    elif settings.init_from == "auto":
        settings.init_from = "scratch"


def check_laplacian_exists(settings):
    if settings.attention == "tau" and not os.path.exists(settings.laplacian):
        raise UserError(
            f"no Laplacian at {settings.laplacian}: make it with `python data/embed.py {settings.data_dir} "
            f"--dim={settings.n_embd}` and `python build_laplacian.py {settings.data_dir}/embeddings.npy "
            f"--out={settings.laplacian}`, or, for a corpus of one document, a chain with `python build_laplacian.py "
            f"--graph=chain --dim={settings.n_embd // settings.n_head} --out={settings.laplacian}`"
        )


def check_made_of(corpus, settings, given):
    """Raise UserError if the corpus was prepared anew, with other text or tokens, since what is read beside it was made. A Laplacian
    that is given is meant as it is."""
    folder = Path(settings.data_dir)
    anew = f"make it again: `python data/embed.py {folder} --dim={settings.n_embd} --overwrite`"
    text = corpus.meta.get("sha256")
    if settings.attention == "tau" and "laplacian" not in given and said_beside(settings.laplacian).get("corpus", text) != text:
        raise UserError(
            f"{settings.laplacian} was made of another text than {folder} holds now: {anew} and `python build_laplacian.py "
            f"{folder}/embeddings.npy --out={settings.laplacian} --overwrite`, or give it with --laplacian={settings.laplacian}"
        )
    made, vectors = said_beside(folder / "embeddings.npy"), folder / "token_embeddings.npy"
    if settings.embedding_init == "domain" and "vocabulary" in made and vectors.exists():
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (vectors, folder / "tokenizer.json")]
        if digests[0] == made.get("token_embeddings") and digests[1] != made["vocabulary"]:
            raise UserError(f"{vectors} was made of another vocabulary than {folder} has now: {anew}")
