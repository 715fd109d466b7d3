#!/usr/bin/env bash
# Ten minutes of a GPU on a machine that sees nothing but this checkout and what is carried there.
#
#   recipes/ten_minutes.sh pack PARTS MODEL CODEC CODES [WHEELS]   here: PARTS/part.aa, part.ab, ..., and PARTS/sums
#   recipes/ten_minutes.sh run PARTS RESULTS                       there: fine-tune, transcribe, keep what is small
#
# MODEL is a language model's folder, CODEC an audio tokenizer's, CODES what encode_speech.py wrote with it, WHEELS
# packages that the other machine lacks (speechllm itself is taken from the checkout). A part has at most 56 MiB; carry
# them one by one if you must, `run` joins them when all are there. RESULTS gets train_log.jsonl and, in test/,
# predictions.jsonl, results.json and report.html.
#
# Variables: STEPS and BATCH (tokens a step), by default thirty times the 1,200 steps of 600 tokens that one core takes
# in 75 minutes; TRAIN_S and ALL_S, the seconds after which the training, and everything, is stopped; CONFIG and ARGS
# of train_asr.py; SPLITS and DECODING of eval_asr.py; PYTHON. A small try:
#
#   STEPS=4 BATCH=600 ARGS="precision=no" SPLITS=[dev] recipes/ten_minutes.sh run PARTS RESULTS
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-python3} STEPS=${STEPS:-900} BATCH=${BATCH:-24000} TRAIN_S=${TRAIN_S:-400} ALL_S=${ALL_S:-570}
CONFIG=${CONFIG:-$root/configs/published/letters_smollm2.yaml} ARGS=${ARGS:-} SPLITS=${SPLITS:-[test]} DECODING=${DECODING:-}

usage() {
    sed -n '2,/^set/s/^# \?//p' "$0" >&2
    exit 2
}

fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

pack() { # PARTS MODEL CODEC CODES [WHEELS]
    (($# == 4 || $# == 5)) || usage
    local parts=$1 name
    [ -z "$(ls -A "$parts" 2> /dev/null)" ] || fail "$parts is not empty: choose another folder"
    mkdir -p "$parts"
    whole=$(mktemp -d) # not local: it is read at the end
    trap 'rm -rf "$whole"' EXIT
    for name in model codec codes wheels; do
        shift
        [ $# -gt 0 ] || break
        [ -d "$1" ] || fail "$1: no such folder, expected $name"
        ln -s "$(realpath "$1")" "$whole/$name"
    done
    tar -chf - -C "$whole" . | xz -1 -T0 | split -b 56M - "$parts/part."
    (cd "$parts" && sha256sum part.* > sums)
    ls -sh "$parts"
}

join() { # PARTS
    local work=$1/work
    (cd "$1" && sha256sum --check --quiet sums) || fail "$1: carry the parts that are missing or damaged, and sums, again"
    if ! cmp --silent "$1/sums" "$work/joined"; then
        rm -rf "$work"
        mkdir "$work"
        (cd "$1" && cut -c 67- sums | xargs cat) | tar -xJf - -C "$work"
        cp "$1/sums" "$work/joined"
    fi
}

run() { # PARTS RESULTS
    (($# == 2)) || usage
    local work=$1/work results=$2 ended=0
    join "$1"
    mkdir -p "$results"
    if [ -d "$work/wheels" ]; then
        "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$work/site" "$work"/wheels/*.whl
        export PYTHONPATH=$PYTHONPATH:$work/site
    fi
    # shellcheck disable=SC2086  # ARGS and DECODING are several words
    timeout --foreground --kill-after=60 "$TRAIN_S" "$PYTHON" "$root/recipes/train_asr.py" --config "$CONFIG" \
        model="$work/model" codes="$work/codes" codec="$work/codec" output="$work/words" dev_splits=null \
        steps="$STEPS" batch_tokens="$BATCH" micro_batch_tokens="$BATCH" precision=bf16 $ARGS || ended=$?
    [ ! -e "$work/words/log.jsonl" ] || cp "$work/words/log.jsonl" "$results/train_log.jsonl"
    [ $ended -ne 124 ] || fail "the training was stopped after $TRAIN_S s; the same command goes on, or set STEPS lower" 124
    [ $ended -eq 0 ] || exit $ended
    # shellcheck disable=SC2086
    timeout --foreground "$((ALL_S > SECONDS ? ALL_S - SECONDS : 1))" "$PYTHON" "$root/recipes/eval_asr.py" \
        model="$work/words/model" codes="$work/codes" output="$results/test" splits="$SPLITS" $DECODING
}

case ${1:-} in
    pack | run) "$@" ;;
    *) usage ;;
esac
