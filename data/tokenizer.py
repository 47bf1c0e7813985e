"""Text <-> tokens. Two kinds, each described by one plain JSON object, which is all that decoding needs:

    {"kind": "bpe", "pattern": regex, "tokens": [...], "end_token": id}     byte-level BPE, run by tiktoken
    {"kind": "char", "tokens": [...], "end_token": id or null}              one token per character

In "bpe" a token's bytes are written as the Latin-1 characters of the same numbers; the list is in the order of the merges,
with null for a number that the vocabulary leaves out. The end token closes every document; a corpus that is one running
text of characters has none.
"""

import os
import re
from itertools import chain, islice

import tiktoken

from common import UserError

RUN = 10_000
LONG_RUN = re.compile(rf"[^\S\r\n]{{{RUN + 1},}}")
END_TEXT = "<|endoftext|>"  # how the end token is shown; in a text to encode these characters are plain text

# Difficult text, with characters of every class: what a vocabulary does with it tells whether it is a whole one.
PROBE = (
    "I'll WE'VE don't \u017f's  \n\n\t x = 1234567;  é 東京 \U0001f469\u200d\U0001f680 a\u0301 <|endoftext|>\r\n \u00a0\u2028end  "
    "It's 1,234 cafés\t中文 \U0001f600!\r\n\n  _x\0 "
)


def parts(text):
    """The text, cut inside runs of more than RUN blanks: the patterns of BPE overflow their stack on some 100,000."""
    begin = 0
    for run in LONG_RUN.finditer(text):
        for cut in range(run.start() + RUN, run.end(), RUN):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]


class BPE:
    kind = "bpe"

    def __init__(self, pattern, tokens, end_token):
        self.pattern, self.tokens, self.end_token = pattern, tokens, end_token
        self.vocab_size = max(len(tokens), end_token + 1)
        self.bytes_of = {i: token.encode("latin-1") for i, token in enumerate(tokens) if token is not None}
        ranks = {token: i for i, token in self.bytes_of.items()}
        if b"" in ranks or len(ranks) < len(self.bytes_of) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("its tokens must be every single byte and longer ones, each once")  # tiktoken would panic on some text
        bytewise = {bytes([byte]): byte for byte in range(256)} | {b"": 256}
        pieces = tiktoken.Encoding("pieces", pat_str=pattern, mergeable_ranks=bytewise, special_tokens={})
        if any(pieces.encode_ordinary(text) != list(text.encode()) for text in ("", PROBE)):
            raise ValueError("its pattern finds empty pieces, or leaves text out")  # tiktoken would panic, or lose it
        self.bytes_of[end_token] = END_TEXT.encode()
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_TEXT: end_token})

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-level BPE trained on an iterator of texts; the end token is the last of the vocab_size tokens.
        A corpus too small for vocab_size - 257 merges gives a smaller vocabulary."""
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator((part for text in texts for part in parts(text)), vocab_size=vocab_size - 1)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls(trainer.get_pattern(), [bytes(token).decode("latin-1") for token, _ in ranks], len(ranks))

    @classmethod
    def named(cls, name):
        """A vocabulary that tiktoken knows by name, such as "gpt2" (downloaded at its first use). Raises UserError if there is none."""
        if name not in tiktoken.list_encoding_names():
            raise UserError(
                f"unknown tokenizer {name!r}: bpe, char, an output folder of train.py, "
                f"or one of {', '.join(tiktoken.list_encoding_names())}"
            )
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:
            raise UserError(
                f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): --tokenizer=bpe needs no network, "
                f"nor does the folder of a corpus or of a run that has {name}"
            ) from None
        tokens = [None] * (max(encoding._mergeable_ranks.values()) + 1)
        for token, rank in encoding._mergeable_ranks.items():
            tokens[rank] = token.decode("latin-1")
        return cls(encoding._pat_str, tokens, encoding.eot_token)

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        cut = [list(parts(text)) for text in texts]
        encoded = iter(self.encoding.encode_ordinary_batch([part for text in cut for part in text], num_threads=os.cpu_count()))
        return [list(chain.from_iterable(islice(encoded, len(text)))) for text in cut]

    def decode_bytes(self, tokens):
        return b"".join(self.bytes_of.get(token, b"") for token in tokens)

    def to_json(self):
        return {"kind": "bpe", "pattern": self.pattern, "tokens": self.tokens, "end_token": self.end_token}


class Characters:
    kind = "char"

    def __init__(self, tokens, end_token):
        self.tokens, self.end_token = tokens, end_token
        self.vocab_size = len(tokens) + (end_token is not None)
        self.id_of = {token: i for i, token in enumerate(tokens)}

    @classmethod
    def train(cls, texts, end_token=True):
        """One token for each character of the texts, in order of code point; the end token, if any, comes last."""
        characters = set()
        for text in texts:
            characters.update(text)
        return cls(sorted(characters), len(characters) if end_token else None)

    def encode(self, text):
        try:
            return [self.id_of[character] for character in text]
        except KeyError as error:
            raise UserError(f"character {error.args[0]!r} is not among the {len(self.tokens)} of the training text: leave it out") from None

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode_bytes(self, tokens):
        return "".join(END_TEXT if token == self.end_token else self.tokens[token] for token in tokens).encode()

    def to_json(self):
        return {"kind": "char", "tokens": self.tokens, "end_token": self.end_token}


def from_json(fields):
    """The tokenizer that to_json() described. Raises UserError for a broken description."""
    try:
        if fields["kind"] == "char":
            return Characters(fields["tokens"], fields["end_token"])
        if fields["kind"] != "bpe":
            raise ValueError(f"its kind is {fields['kind']!r}")
        if not 0 <= fields["end_token"] < 2**24:
            raise ValueError(f"its end token is {fields['end_token']}")
        return BPE(fields["pattern"], fields["tokens"], fields["end_token"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"broken tokenizer description ({type(error).__name__}: {error})") from None
