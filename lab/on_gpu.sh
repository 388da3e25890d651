#!/usr/bin/env bash
# The evidence that needs a GPU, the most valuable first:
#
#     bash lab/on_gpu.sh OUT [--minutes 9] [--quick]
#
#   gpu-rates    learning rates for the paper's table
#   gpu-table    the paper's table: LoRA, dense continuation, expansion, the last two also with an LLM; three
#                seeds. Arms are trained side by side: one compiles or draws while another trains
#   scale        the window of growth: budgets of 4 and 16 times 2.4e13 FLOPs, and learning rates for it
#   pretrained   the included model: `tiny` learns both sets of the toy world on small clips, where a step
#                is cheap. It is grown to twice the width, larger patches (64x64), 16 frames and a language
#                model, and continues for the time that is left; with scores
#   actors       when prompts of one, two and three actors are learned, from the weights on the way
#
# What results/ has already is not made again, so the script continues on the next machine. It leaves a parcel
# in OUT (lab/parcel.py), also if it is stopped; `python -m lab.study --take OUT` puts it into its places. With
# --quick everything runs at tiny sizes, also on a CPU, with results of its own. Nothing is downloaded.
set -euo pipefail
set -m # Ctrl-C in a terminal reaches this script alone, which asks what it has begun to save and stop
trap 'kill $(jobs -p) 2> /dev/null || true; wait; exit 130' HUP INT TERM
out=${1:?usage: bash lab/on_gpu.sh OUT [--minutes 9] [--quick]}
minutes=9 quick=
shift
while (($#)); do
    case $1 in
    --minutes) minutes=$2 && shift ;;
    --quick) quick=yes ;;
    *) echo "error: no option is called $1" >&2 && exit 2 ;;
    esac
    shift
done
limit=$(python -c "print(int($minutes * 60))")
program() { # runs python so that a signal to this script need not wait for its end
    python "$@" &
    wait $!
}
left() { echo $((limit - SECONDS - $1)); } # seconds, less some that are needed afterwards
in_minutes() { python -c "print($1 / 60)"; }

runs=runs/gpu results=results
bases=("0:base" "1:base" "2:base") # SEEDS:ARM[:ARM ...] of processes that run side by side
rates=("0:lora, 0.0015:lora, 0.003:lora, 0.006" "0:lora, 0.012:lora, 0.024")
for kind in "dense continuation" expansion; do
    rates+=("0:$kind, 0.0015:$kind, 0.003:$kind, 0.006")
done
table=()
for kind in lora "dense continuation" expansion "expansion + llm" "dense continuation + llm"; do
    table+=("0 1 2:$kind")
done
data="--data both --words varied --clips 32768"
base="$data --batch 128 --steps 8000 --every 2000 --decay 0 --keep"
larger="--patch 2 --frames 16 --width 2"
grown="$data --batch 64 --every 3000 --keep --grow llm"
actors="--count 100" scores="--count 200" study=--no-report
scale="--clips 98304 --batch 64 --budgets 4 16 --tune"
if [[ $quick ]]; then
    runs=$out/runs results=$out/results bases=("0:base") rates=("0:lora, 0.003") table=("0:lora")
    data="--data both --clips 16 --batch 4 --no-compile"
    base="$data --preset nano --depth 1 --frames 4 --size 16 --steps 4 --every 2 --decay 0 --keep"
    larger="--patch 2 --frames 8 --width 2"
    grown="$data --every 2 --keep --grow llm"
    actors="--count 4" scores="--count 4 --steps 1" study="--no-report --quick" scale="--quick --budgets 1 --seeds 0"
fi

pack() { # leaves in OUT what is there so far
    local trained=()
    [[ -f $runs/pretrained/trained ]] && trained=("$runs/pretrained-base" "$runs/pretrained")
    python -m lab.parcel "$out" ${trained[@]+"${trained[@]}"} --results "$results"
}
trap pack EXIT

side_by_side() { # PART PROCESS ...: trains and scores arms of the study, as many as there is time for
    (($(left 200) > 0)) || return 0
    pack & # beside the rest
    local minutes=$(in_minutes $(left 200))
    local options=($study --parts "$1" --minutes "$minutes" --runs "$runs/study" --results "$results")
    local process fields arms threads=$((($(nproc) + $# - 2) / ($# - 1)))
    for process in "${@:2}"; do
        IFS=: read -ra fields <<< "$process"
        arms=(--seeds ${fields[0]} --arms "${fields[@]:1}")
        OMP_NUM_THREADS=$threads python -m lab.study "${options[@]}" "${arms[@]}" &
    done
    wait # for all; one that fails has said why, and stops nothing else
}

window() { # trains arms of the window of growth, if there is time
    (($(left 180) > 0)) || return 0 # it draws and reads captions for a minute
    pack &
    local folders=(--runs "$runs/scale" --out "$results/scale-on-a-gpu")
    program -m lab.scale $scale --minutes $(in_minutes $(left 60)) "${folders[@]}" || true # it has said why
    wait
}

run() { # NAME OPTION ...: trains a run, or what is left of it
    if [[ -d $runs/$1/checkpoint ]]; then
        program train.py --resume --out "$runs/$1"
    else
        program train.py "${@:2}" --out "$runs/$1"
    fi
}

side_by_side gpu-rates "${bases[0]}"
side_by_side gpu-rates "${rates[@]}"
side_by_side gpu-table "${bases[@]}"
side_by_side gpu-table "${table[@]}"
window
if [[ ! -f $results/actors/pretrained.json ]]; then
    if [[ ! -d $runs/pretrained ]]; then
        pack
        (($(left 260) > 0)) || exit 0 # the next call has the time
        run pretrained-base $base
        if [[ ! -d $runs/larger/checkpoint ]]; then
            rm -rf "$runs/larger"
            python grow.py "$runs/pretrained-base" $larger --out "$runs/larger"
        fi
    fi
    (($(left 160) > 0)) || exit 0
    if [[ $quick ]]; then long="--steps 4"; else long="--minutes $(in_minutes $(left 100))"; fi
    run pretrained $grown $long --from "$runs/larger"
    touch "$runs/pretrained/trained" # to its end: worth keeping
    rm -f "$results"/pretrained/evaluation.{json,gif} # of the model before
    pack
    mkdir -p "$results/pretrained" "$results/actors"
    program -m lab.evaluate "$runs/pretrained" $scores --out "$results/pretrained/evaluation.json"
    program -m lab.actors "$runs/pretrained-base" "$runs/pretrained" $actors --results "$runs"
    mv "$runs/actors/pretrained.json" "$results/actors/" # with all its points
fi
