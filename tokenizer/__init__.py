"""Speech to codes and back: audio input and output, the codec, its teachers and losses.

Knows nothing of language models. Users import everything from `speechllm`.
"""

from typing import TYPE_CHECKING

from tokenizer.lazy import lazy_names

if TYPE_CHECKING:  # imported when first used; lazy_names reads these lines
    from tokenizer.analysis import (
        codebook_usage,
        label_information,
        log_mel_features,
        speaker_accuracy,
        usage_of_counts,
    )
    from tokenizer.audio import AudioError, load_audio, pad_waveforms, save_audio
    from tokenizer.cache import FeatureCache
    from tokenizer.codec import SpeechCodec, SpeechCodecConfig, check_folder
    from tokenizer.convert import convert_encodec, convert_speechtokenizer
    from tokenizer.corpus import CorpusError, Crops, StepSampler, Utterance, available_cpus, frame_phones, read_corpus
    from tokenizer.discriminators import (
        Adversary,
        MultiPeriodDiscriminator,
        MultiScaleDiscriminator,
        MultiScaleSTFTDiscriminator,
        make_discriminators,
    )
    from tokenizer.distillation import AcousticDistillation, SemanticDistillation
    from tokenizer.interface import (
        AudioTokenizer,
        Codec,
        Codes,
        DiscreteTokenizer,
        Features,
        FeatureTokenizer,
        Transcripts,
    )
    from tokenizer.losses import Balancer, MultiScaleMelLoss, ReconstructionLoss
    from tokenizer.parallel import average_gradients
    from tokenizer.probe import ctc_probe
    from tokenizer.quality import Quality, QualityError, layer_counts, reconstruct, speech_quality
    from tokenizer.small_teachers import FrameClassifier, save_ecapa, save_hubert, small_hubert
    from tokenizer.streaming import StreamingDecoder, StreamingEncoder
    from tokenizer.teachers import SemanticTeacher, SpeakerTeacher
    from tokenizer.training import (
        Lesson,
        average_weights,
        codec_backward,
        draw_layers,
        initialize_codebooks,
    )
    from tokenizer.validation import Validation, validate_codec
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "AcousticDistillation",
    "Adversary",
    "AudioError",
    "AudioTokenizer",
    "Balancer",
    "Codec",
    "Codes",
    "CorpusError",
    "Crops",
    "DiscreteTokenizer",
    "FeatureCache",
    "FeatureTokenizer",
    "Features",
    "FrameClassifier",
    "Lesson",
    "MultiPeriodDiscriminator",
    "MultiScaleDiscriminator",
    "MultiScaleMelLoss",
    "MultiScaleSTFTDiscriminator",
    "Quality",
    "QualityError",
    "ReconstructionLoss",
    "SemanticDistillation",
    "SemanticTeacher",
    "SpeakerTeacher",
    "SpeechCodec",
    "SpeechCodecConfig",
    "StepSampler",
    "StreamingDecoder",
    "StreamingEncoder",
    "Transcripts",
    "Utterance",
    "Validation",
    "available_cpus",
    "average_gradients",
    "average_weights",
    "check_folder",
    "codebook_usage",
    "codec_backward",
    "convert_encodec",
    "convert_speechtokenizer",
    "ctc_probe",
    "draw_layers",
    "frame_phones",
    "initialize_codebooks",
    "label_information",
    "layer_counts",
    "load_audio",
    "log_mel_features",
    "make_discriminators",
    "pad_waveforms",
    "read_corpus",
    "reconstruct",
    "save_audio",
    "save_ecapa",
    "save_hubert",
    "small_hubert",
    "speaker_accuracy",
    "speech_quality",
    "usage_of_counts",
    "validate_codec",
]
