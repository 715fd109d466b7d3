"""Speech in, text out."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from speechllm.decoding import BATCH_TOKENS, recognize
from speechllm.encoding import Speech
from speechllm.model import SpeechLLM
from speechllm.pieces import pieces


def transcribe(
    speech: Iterable[str | Path | Tensor],
    speech_llm: SpeechLLM,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
    beams: int = 1,
    fallback: bool = True,
    static_cache: bool = False,
    letters_weight: float = 0.0,
) -> list[str]:
    """Texts of recordings, given as files or as waveforms float [N] at the codec's rate, in the order given.

    They are encoded one by one, so that an iterator need hold no more than one waveform in memory. A file of more than
    30 s is read and transcribed in `pieces`, cut where it is quiet; a waveform is taken as a whole, as eval_asr takes
    what encode_speech has encoded.

    beams, fallback, static_cache, letters_weight: as in `recognize`. Raises AudioError for an unusable file.
    """
    codec = speech_llm.codec
    if codec is None:
        raise ValueError("this SpeechLLM has no codec: load it with load_speech_llm, or use transcribe_codes")
    encoded: list[Speech] = []
    durations_s, counts = [], []
    for item in tqdm(speech, "encode", disable=not progress):
        if isinstance(item, Tensor):
            waveforms: Iterable[Tensor] = [item]
        else:
            waveforms = (piece.waveform for piece in pieces(item, codec.sample_rate))
        before = len(encoded)
        for waveform in waveforms:
            encoded.append(speech_llm.vocabulary.encoding.encode(codec, waveform))
            durations_s.append(len(waveform) / codec.sample_rate)
        counts.append(len(encoded) - before)
    options = beams, fallback, durations_s, static_cache, letters_weight
    found = iter(recognize(encoded, speech_llm, batch_tokens, progress, *options))
    return [" ".join(filter(None, (next(found).text for _ in range(count)))) for count in counts]


def transcribe_codes(
    codes: Sequence[Tensor],
    speech_llm: SpeechLLM,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
    beams: int = 1,
    fallback: bool = True,
    static_cache: bool = False,
    letters_weight: float = 0.0,
    durations_s: Sequence[float] | None = None,
) -> list[str]:
    """Texts of utterances given as codes long [Q, T], in the order given; the rest as in `recognize`."""
    options = beams, fallback, durations_s, static_cache, letters_weight
    found = recognize(codes, speech_llm, batch_tokens, progress, *options)
    return [transcription.text for transcription in found]
