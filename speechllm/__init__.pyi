"""The public names, for type checkers and for lazy_loader, which imports each when it is first used."""

# tokenizers
# language models that hear
from .adapters import prepare_adapter as prepare_adapter
from .data.encoded import load_codes as load_codes
from .data.encoded import speech_of as speech_of

# speech on disk, encoded
from .data.shards import encode_shards as encode_shards

# errors
from .encoding import DataError as DataError
from .encoding import Encoding as Encoding

# error rates
from .evaluation.error_rates import PairedBootstrap as PairedBootstrap
from .evaluation.error_rates import WordErrorRate as WordErrorRate
from .evaluation.error_rates import character_error_rate as character_error_rate
from .evaluation.error_rates import paired_bootstrap as paired_bootstrap
from .evaluation.error_rates import word_error_rate as word_error_rate
from .export import export_model as export_model
from .export import merge as merge
from .extension import describe_rows as describe_rows
from .extension import extend_vocabulary as extend_vocabulary
from .model import SpeechLLM as SpeechLLM
from .model import load_language_model as load_language_model
from .model import load_speech_llm as load_speech_llm
from .prompt import Example as Example
from .prompt import transcription_example as transcription_example
from .prompt import transcription_prompt as transcription_prompt
from .runs.config import ConfigError as ConfigError
from .runs.run import RunError as RunError

# errors
from .speech import AudioError as AudioError
from .speech import AudioTokenizer as AudioTokenizer
from .speech import Codec as Codec
from .speech import Codes as Codes
from .speech import CorpusError as CorpusError
from .speech import DiscreteTokenizer as DiscreteTokenizer
from .speech import Features as Features
from .speech import FeatureTokenizer as FeatureTokenizer
from .speech import InputError as InputError

# measures of speech
from .speech import Quality as Quality
from .speech import QualityError as QualityError
from .speech import SpeechCodec as SpeechCodec
from .speech import SpeechCodecConfig as SpeechCodecConfig
from .speech import StreamingDecoder as StreamingDecoder
from .speech import StreamingEncoder as StreamingEncoder
from .speech import TokenizerError as TokenizerError
from .speech import Transcripts as Transcripts

# speech on disk
from .speech import Utterance as Utterance
from .speech import codebook_usage as codebook_usage
from .speech import convert_encodec as convert_encodec
from .speech import convert_speechtokenizer as convert_speechtokenizer
from .speech import convert_voice as convert_voice
from .speech import load_audio as load_audio
from .speech import load_codec as load_codec
from .speech import load_tokenizer as load_tokenizer
from .speech import pad_waveforms as pad_waveforms
from .speech import read_corpus as read_corpus
from .speech import reconstruct as reconstruct
from .speech import save_audio as save_audio
from .speech import speech_quality as speech_quality
from .speech import swap_layers as swap_layers
from .training.loss import LabelledLoss as LabelledLoss
from .transcription import transcribe as transcribe
from .transcription import transcribe_codes as transcribe_codes
from .vocabulary import AudioVocabulary as AudioVocabulary
from .vocabulary import VocabularyError as VocabularyError
