"""Speech to codes and back: audio input and output, the codec, its teachers and losses.

Knows nothing of language models. Users import everything from `speechllm`.
"""

from tokenizer.analysis import codebook_usage, label_information, log_mel_features, speaker_accuracy
from tokenizer.audio import AudioError, load_audio, pad_waveforms, save_audio
from tokenizer.codec import SpeechCodec, SpeechCodecConfig, check_folder
from tokenizer.corpus import CorpusError, Crops, StepSampler, Utterance, available_cpus, frame_phones, read_corpus
from tokenizer.distillation import AcousticDistillation, SemanticDistillation
from tokenizer.interface import AudioTokenizer, Codec, Codes, Features, Transcripts
from tokenizer.losses import MultiScaleMelLoss, scale_for
from tokenizer.small_teachers import FrameClassifier, save_ecapa, save_hubert, small_hubert
from tokenizer.teachers import SemanticTeacher, SpeakerTeacher
from tokenizer.training import (
    Lesson,
    ReconstructionLoss,
    average_gradients,
    codec_backward,
    draw_layers,
    initialize_codebooks,
)

__all__ = [
    "AcousticDistillation",
    "AudioError",
    "AudioTokenizer",
    "Codec",
    "Codes",
    "CorpusError",
    "Crops",
    "Features",
    "FrameClassifier",
    "Lesson",
    "MultiScaleMelLoss",
    "ReconstructionLoss",
    "SemanticDistillation",
    "SemanticTeacher",
    "SpeakerTeacher",
    "SpeechCodec",
    "SpeechCodecConfig",
    "StepSampler",
    "Transcripts",
    "Utterance",
    "available_cpus",
    "average_gradients",
    "check_folder",
    "codebook_usage",
    "codec_backward",
    "draw_layers",
    "frame_phones",
    "initialize_codebooks",
    "label_information",
    "load_audio",
    "log_mel_features",
    "pad_waveforms",
    "read_corpus",
    "save_audio",
    "save_ecapa",
    "save_hubert",
    "scale_for",
    "small_hubert",
    "speaker_accuracy",
]
