#!/usr/bin/env bash
# The mission in ten minutes of one GPU, on a machine that sees nothing but this checkout and what is carried there.
#
#   recipes/ten_minutes.sh pack PARTS MODEL CODEC CODES [WHEELS]   here: PARTS/part.aa, PARTS/part.ab, ... of 56 MB
#   recipes/ten_minutes.sh run PARTS RESULTS                       there: fine-tune, transcribe, keep what is small
#
# MODEL is a language model's folder, CODEC an audio tokenizer's, CODES what encode_speech.py wrote with it, or the vectors
# of a compressor; splits train and test. WHEELS holds packages that the other machine lacks. Carry the parts one by one:
# `run` joins them when all are there. RESULTS gets results.json, predictions.jsonl, report.html and the training's log.
# The defaults are thirty times what two cores train in 75 minutes (configs/published/letters_smollm2.yaml); smaller:
#
#   STEPS=20 BATCH=600 SECONDS_AT_MOST=300 ARGS="precision=no" recipes/ten_minutes.sh run PARTS RESULTS
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # speechllm need not be installed there
PYTHON=${PYTHON:-python3} STEPS=${STEPS:-900} BATCH=${BATCH:-24000} SECONDS_AT_MOST=${SECONDS_AT_MOST:-420}
ARGS=${ARGS:-precision=bf16} SPLITS=${SPLITS:-[test]} DECODING=${DECODING:-} CONFIG=${CONFIG:-$root/configs/published/letters_smollm2.yaml}

usage() {
    sed -n '2,13s/^# \?//p' "$0" >&2
    exit 2
}

pack() { # PARTS MODEL CODEC CODES [WHEELS]
    (($# == 4 || $# == 5)) || usage
    local folder=$1
    if [ -e "$folder" ] && [ -n "$(ls -A "$folder")" ]; then echo "$folder is not empty: choose another" >&2 && exit 1; fi
    mkdir -p "$folder" && whole=$(mktemp -d) && trap 'rm -rf "$whole"' EXIT  # not local: read at the end
    for name in model codec codes wheels; do
        shift && [ $# -gt 0 ] || continue
        [ -d "$1" ] || { echo "$1: no such folder" >&2 && exit 1; }
        ln -s "$(realpath "$1")" "$whole/$name"
    done
    tar -chf - -C "$whole" . | xz -1 -T0 | split -b 56M - "$folder/part."
    sha256sum "$folder"/part.* | sed "s# .*/# #" > "$folder/sums"
    ls -sh "$folder"
}

run() { # PARTS RESULTS
    (($# == 2)) || usage
    local parts=$1 results=$2 work
    work=$parts/work
    mkdir -p "$work" "$results"
    (cd "$parts" && sha256sum --check --quiet sums) || { echo "$parts: not all parts are there, or one is damaged" >&2 && exit 1; }
    [ -e "$work/joined" ] || { cat "$parts"/part.* | tar -xJf - -C "$work" && touch "$work/joined"; }
    if [ -d "$work/wheels" ]; then
        "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$work/site" "$work"/wheels/*.whl
        export PYTHONPATH=$PYTHONPATH:$work/site
    fi
    local trained=0
    timeout --signal=TERM "$SECONDS_AT_MOST" "$PYTHON" "$root/recipes/train_asr.py" --config "$CONFIG" model="$work/model" \
        codes="$work/codes" codec="$work/codec" output="$work/words" dev_splits=null steps="$STEPS" batch_tokens="$BATCH" \
        micro_batch_tokens="$BATCH" $ARGS || trained=$?
    cp "$work/words/log.jsonl" "$results/train_log.jsonl"
    ((trained == 0)) || { echo "the training ended with $trained; stopped in time (124), the same command goes on" >&2 && exit "$trained"; }
    "$PYTHON" "$root/recipes/eval_asr.py" model="$work/words/model" codes="$work/codes" output="$results/test" splits="$SPLITS" $DECODING
}

case ${1:-} in
    pack | run) "$@" ;;
    *) usage ;;
esac
