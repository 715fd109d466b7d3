"""Settings that cannot work: refused before anything is loaded or written, naming the key."""

from pathlib import Path

from judge import Case, refused
from parts import ALIGNMENT, ASR, COMPRESSOR, CUT, EMOTION, ENCODE, EVAL_ASR, REPCODEC, SPEAKER, TEXT, TOKENIZER, UNITS

SOON_S = 20  # of a refusal, on a machine that does other things too
COMMANDS = {
    "train_teacher": (SPEAKER, "corpus"),
    "alignment teacher": (ALIGNMENT, "corpus"),
    "train_tokenizer": (TOKENIZER, "corpus alignment speaker"),
    "train_asr": (ASR, "codes tokenizer"),
    "train_compressor": (COMPRESSOR, "codes tokenizer"),
    "train_repcodec": (REPCODEC, "frames alignment"),
    "cut_speech": (CUT, "codes letters"),
    "train_text": (TEXT, "text.txt"),
    "train_emotion": (EMOTION, "actor_codes tokenizer"),
    "encode_speech": (ENCODE, "corpus tokenizer"),
    "fit_units": (UNITS, "corpus alignment"),
    "eval_asr": (EVAL_ASR, "asr codes"),
    "eval_codec": ("eval_codec.py codec=tokenizer/model data=corpus", "corpus tokenizer"),
    "eval_conversion": ("eval_conversion.py codec=tokenizer/model data=corpus", "corpus tokenizer"),
    "eval_tokenizer": ("eval_tokenizer.py codes=codes data=corpus", "codes corpus"),
    "benchmark": ("benchmark.py row=lm_step codes=codes", "codes"),
    "demo": ("demo.py data=corpus", "corpus"),
}
WORDS = {
    "train_teacher": "crop_s=-1 crop_s=0.01 crop_s=.nan learning_rate=0 learning_rate=-1e-3 learning_rate=.nan "
    "learning_rate=.inf seed=-1 steps=0 steps=-5 batch_size=0 warmup=0 save_every=0 channels=0 channels=-8 channels=7 "
    "max_duration_s=-1 max_duration_s=0 max_duration_s=.nan steps=1.5 steps=many steps=99999999999999999999",
    "alignment teacher": "hidden_size=17 hidden_size=0 hidden_size=-16 layers=0 layers=-1",
    "train_tokenizer": "crop_s=-1 crop_s=0.01 crop_s=0 decode_s=0 decode_s=9 learning_rate=0 learning_rate=-1 seed=-1 "
    "codec.num_codebooks=0 codec.codebook_size=0 codec.codebook_size=1 codec.n_filters=0 codec.n_filters=-4 "
    "codec.dimension=0 codec.dimension=-8 codec.strides=[0] codec.strides=[] codec.sample_rate=0 codec.sample_rate=-1 "
    "losses.mel=-1 losses.time=-0.1 losses.mel_windows=[0] losses.mel_windows=[] betas=[2,2] betas=[0.9] "
    "adversary.betas=[0.5] adversary.learning_rate=0 adversary.learning_rate=-1 adversary.start=-1 clip=0 clip=-1 "
    "weight_average=1 codebook_decay=1 codebook_decay=-1 quantizer_dropout=[0] quantizer_dropout=[9] num_workers=-1 "
    "weight_decay=-1 semantic.gradient_ratio=-1 acoustic.gradient_ratio=-1 semantic.weight=-1 batch_size=0 steps=0 "
    "log_every=0 validate_every=0 linear_start=true codec.phases=griffin_lim codec.phases=x",
    "train_asr": "learning_rate=0 learning_rate=-1 learning_rate=.nan row_learning_rate=-1 clip=0 seed=-1 layers=0 "
    "layers=-1 stack=0 batch_tokens=0 micro_batch_tokens=0 small.hidden_size=17 small.num_attention_heads=0 "
    "small.num_attention_heads=3 small.num_key_value_heads=3 small.text_tokens=0 small.text_tokens=-1 "
    "small.text_steps=-1 small.num_hidden_layers=0 weight_average=1 weight_average=0 patience=0 max_utterances=0 "
    "dev_utterances=0 speech_loss=-1 weight_decay=-1 row_steps=-1 augmentation.mask=2 augmentation.spans=-1 "
    "precision=fp8 init=best lora.rank=0 steps=0 warmup=0",
    "cut_speech": "words=0 words=-1 normalizer=x",
    "train_compressor": "width=0 depth=0 dropout=1 mask_s=-1 batch_size=0 steps=0 learning_rate=0 "
    "max_duration_s=0 max_duration_s=.nan warmup=-1 clip=0 seed=-1 save_every=0 dev_utterances=0 normalizer=whisper",
    "train_repcodec": "num_codebooks=0 codebook_size=1 codebook_size=70000 codebook_decay=1 depth=0 commitment=0 "
    "crop_s=0 crop_s=.nan steps=0 batch_size=0 learning_rate=0 warmup=-1 clip=0 seed=-1 save_every=0 dev_utterances=0",
    "train_text": "learning_rate=0 learning_rate=-1 steps=0 batch_size=0 block=0 block=-1 block=1 text_tokens=0 "
    "text_tokens=3 seed=-1 warmup=-1 save_every=0 log_every=0 validate_every=0 shape.hidden_size=17 "
    "shape.num_attention_heads=0 shape.num_key_value_heads=3 text=[]",
    "train_emotion": "learning_rate=0 learning_rate=-1 folds=1 folds=99 epochs=0 batch_size=0 warmup=0 layers=[] "
    "layers=[9] layers=[-1] bert.hidden_size=15 bert.num_attention_heads=0 bert.num_attention_heads=3 seed=-1 clip=0 "
    "weight_decay=-1",
    "encode_speech": "layers=0 layers=-1 layers=99 max_duration_s=0 max_duration_s=-1 max_duration_s=.nan "
    "normalizer=whisper",
    "fit_units": "clusters=1 clusters=0 clusters=70000 bpe=0 bpe=6 max_frames=0 max_frames=-1 max_duration_s=-1 "
    "max_duration_s=0 seed=-1 layer=99 layer=last",
    "eval_asr": "beams=0 beams=-1 batch_tokens=0 shuffled_utterances=1 seed=-1 normalizer=whisper",
    "eval_codec": "layers=[0] layers=[9] layers=[] layers=[-1] max_utterances=0 max_utterances=-1 seed=-1",
    "eval_conversion": "pairs=0 pairs=-1 layers=[] layers=[[]] layers=[[9]] layers=[[-1]] seed=-1",
    "eval_tokenizer": "probe_steps=-1 kmeans_utterances=0 kmeans_utterances=-1 seed=-1",
    "benchmark": "repeats=0 repeats=-1 batch_tokens=0 micro_batch_tokens=0 peak_tflops=0 peak_tflops=-1",
    "demo": "scale=0 scale=-1 scale=.nan processes=0 processes=-2 nowhere=nowhere.yaml",
}


def nothing_written(folder: Path, _: str) -> bool:
    return not (folder / "new").exists()


def setting(recipe: str, word: str) -> Case:
    command, needs = COMMANDS[recipe]
    key = word.partition("=")[0].split(".")[-1]
    pattern = rf"{key}|{key.replace('_', ' ')}"
    return Case(
        f"{recipe} {word}", f"{command} {word} output=new", refused(pattern, nothing_written), needs, limit_s=SOON_S
    )


def option(command: str, pattern: str, needs: str = "") -> Case:
    return Case(command, command, refused(pattern), needs, limit_s=SOON_S)


OPTIONS = (
    option("synthesize_speech.py new --train -1 --dev 1 --test 1", "train"),
    option("synthesize_speech.py new --train 0 --dev 0 --test 0", "train|utterance"),
    option("synthesize_speech.py new --train 4 --dev 1 --test 1 --jobs 0", "jobs"),
    option("synthesize_speech.py new --train 4 --dev 1 --test 1 --jobs -2", "jobs"),
    option("speechllm transcribe corpus/test/u18.flac --model asr/model --batch-tokens 0", "batch", "corpus asr"),
    option("speechllm transcribe corpus/test/u18.flac --model asr/model --beams 0", "beams", "corpus asr"),
    option("speechllm transcribe corpus/test/u18.flac --model asr/model --max-duration -1", "duration", "corpus asr"),
    option("speechllm transcribe corpus/test/u18.flac --model asr/model --max-duration nan", "duration", "corpus asr"),
    option("speechllm encode corpus/test/u18.flac --codec tokenizer/model --layers 0", "layers", "corpus tokenizer"),
    option("speechllm encode corpus/test/u18.flac --codec tokenizer/model --layers 9", "layers", "corpus tokenizer"),
    option(
        "speechllm reconstruct corpus/test/u18.flac --codec tokenizer/model --layers 0 --output new",
        "layers|codebooks",
        "corpus tokenizer",
    ),
    option(
        "speechllm convert corpus/dev/u12.flac corpus/dev/u13.flac --codec tokenizer/model --layers 9 --output a.wav",
        "layer",
        "corpus tokenizer",
    ),
    option("speechllm codebooks --codec tokenizer/model --data corpus --split nowhere", "nowhere", "corpus tokenizer"),
    option("speechllm codebooks --codec tokenizer/model", "files|data", "tokenizer"),
    option("speechllm run train_teacher --processes 0 kind=speaker data=corpus output=new", "processes", "corpus"),
    option("speechllm run train_teacher --processes -1 kind=speaker data=corpus output=new", "processes", "corpus"),
    option("speechllm run", "recipe"),
    option("speechllm", "command"),
)
CASES = (*(setting(recipe, word) for recipe, words in WORDS.items() for word in words.split()), *OPTIONS)
