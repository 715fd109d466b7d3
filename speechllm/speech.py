"""Public names defined in the package `tokenizer`, so that users can import everything from `speechllm`."""

# tokenizers
# errors
from tokenizer.audio import AudioError as AudioError

# speech on disk
from tokenizer.audio import load_audio as load_audio
from tokenizer.audio import pad_waveforms as pad_waveforms
from tokenizer.audio import save_audio as save_audio
from tokenizer.codec.config import SpeechCodecConfig as SpeechCodecConfig
from tokenizer.codec.converters import convert_encodec as convert_encodec
from tokenizer.codec.converters import convert_speechtokenizer as convert_speechtokenizer
from tokenizer.codec.speech_codec import SpeechCodec as SpeechCodec
from tokenizer.codec.streaming import StreamingDecoder as StreamingDecoder
from tokenizer.codec.streaming import StreamingEncoder as StreamingEncoder
from tokenizer.corpus import CorpusError as CorpusError
from tokenizer.corpus import Utterance as Utterance
from tokenizer.corpus import read_corpus as read_corpus
from tokenizer.errors import InputError as InputError
from tokenizer.interface import AudioTokenizer as AudioTokenizer
from tokenizer.interface import Codec as Codec
from tokenizer.interface import Codes as Codes
from tokenizer.interface import DiscreteTokenizer as DiscreteTokenizer
from tokenizer.interface import Features as Features
from tokenizer.interface import FeatureTokenizer as FeatureTokenizer
from tokenizer.interface import Transcripts as Transcripts
from tokenizer.loading import TokenizerError as TokenizerError
from tokenizer.loading import load_codec as load_codec
from tokenizer.loading import load_tokenizer as load_tokenizer

# measures of speech
from tokenizer.metrics.code_usage import codebook_usage as codebook_usage
from tokenizer.metrics.conversion import convert_voice as convert_voice
from tokenizer.metrics.conversion import swap_layers as swap_layers
from tokenizer.metrics.quality import Quality as Quality
from tokenizer.metrics.quality import QualityError as QualityError
from tokenizer.metrics.quality import reconstruct as reconstruct
from tokenizer.metrics.quality import speech_quality as speech_quality
