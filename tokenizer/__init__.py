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
    from tokenizer.conversion import (
        MATCHINGS,
        convert_voice,
        swap_layers,
    )
    from tokenizer.convert import convert_encodec, convert_speechtokenizer
    from tokenizer.corpus import (
        CorpusError,
        Crops,
        StepSampler,
        Utterance,
        available_cpus,
        frame_phones,
        left_out_row,
        load_usable,
        read_corpus,
        spread,
    )
    from tokenizer.discriminators import (
        Adversary,
        MultiPeriodDiscriminator,
        MultiScaleDiscriminator,
        MultiScaleSTFTDiscriminator,
        make_discriminators,
    )
    from tokenizer.distillation import AcousticDistillation, SemanticDistillation
    from tokenizer.features import (
        FeatureEncoder,
    )
    from tokenizer.freevc import (
        FreeVC,
    )
    from tokenizer.interface import (
        AudioTokenizer,
        Codec,
        Codes,
        DiscreteTokenizer,
        Features,
        FeatureTokenizer,
        Transcripts,
    )
    from tokenizer.judges import (
        embed_voice,
        hear,
        load_judge,
    )
    from tokenizer.loading import (
        TokenizerError,
        load_codec,
        load_tokenizer,
    )
    from tokenizer.losses import Balancer, MultiScaleMelLoss, ReconstructionLoss
    from tokenizer.parallel import average_gradients
    from tokenizer.probe import ctc_probe
    from tokenizer.prosody import (
        VoiceFrames,
        align_voices,
        dtw,
        mel_cepstra,
        mel_cepstral_distortion,
        pitch_correlation,
        voice_frames,
    )
    from tokenizer.published import (
        PublishedCodec,
    )
    from tokenizer.quality import (
        MAX_SCORED_S,
        Quality,
        QualityError,
        at_16_khz,
        layer_counts,
        reconstruct,
        speech_quality,
    )
    from tokenizer.ravdess import (
        RavdessName,
        parse_ravdess,
    )
    from tokenizer.recognizer import (
        Recognizer,
    )
    from tokenizer.small_teachers import (
        FrameClassifier,
        save_ecapa,
        save_hubert,
        save_recognizer,
        small_hubert,
    )
    from tokenizer.streaming import StreamingDecoder, StreamingEncoder
    from tokenizer.teachers import SemanticTeacher, SpeakerTeacher
    from tokenizer.training import (
        Lesson,
        average_weights,
        codec_backward,
        draw_layers,
        initialize_codebooks,
    )
    from tokenizer.units import (
        UnitTokenizer,
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
    "FeatureEncoder",
    "FeatureTokenizer",
    "Features",
    "FrameClassifier",
    "FreeVC",
    "Lesson",
    "MATCHINGS",
    "MAX_SCORED_S",
    "MultiPeriodDiscriminator",
    "MultiScaleDiscriminator",
    "MultiScaleMelLoss",
    "MultiScaleSTFTDiscriminator",
    "PublishedCodec",
    "Quality",
    "QualityError",
    "RavdessName",
    "Recognizer",
    "ReconstructionLoss",
    "SemanticDistillation",
    "SemanticTeacher",
    "SpeakerTeacher",
    "SpeechCodec",
    "SpeechCodecConfig",
    "StepSampler",
    "StreamingDecoder",
    "StreamingEncoder",
    "TokenizerError",
    "Transcripts",
    "UnitTokenizer",
    "Utterance",
    "Validation",
    "VoiceFrames",
    "align_voices",
    "at_16_khz",
    "available_cpus",
    "average_gradients",
    "average_weights",
    "check_folder",
    "codebook_usage",
    "codec_backward",
    "convert_encodec",
    "convert_speechtokenizer",
    "convert_voice",
    "ctc_probe",
    "draw_layers",
    "dtw",
    "embed_voice",
    "frame_phones",
    "hear",
    "initialize_codebooks",
    "label_information",
    "layer_counts",
    "left_out_row",
    "load_audio",
    "load_codec",
    "load_judge",
    "load_tokenizer",
    "load_usable",
    "log_mel_features",
    "make_discriminators",
    "mel_cepstra",
    "mel_cepstral_distortion",
    "pad_waveforms",
    "parse_ravdess",
    "pitch_correlation",
    "read_corpus",
    "reconstruct",
    "save_audio",
    "save_ecapa",
    "save_hubert",
    "save_recognizer",
    "small_hubert",
    "speaker_accuracy",
    "speech_quality",
    "spread",
    "swap_layers",
    "usage_of_counts",
    "validate_codec",
    "voice_frames",
]
