#!/usr/bin/env bash
# What only a GPU can show: its tests, and the figures of the benches. One section fails, the others still run.
#
#   tools/gpu_checks.sh                   all sections, in this order
#   tools/gpu_checks.sh digest scrub      some of them
#
#   digest        how fast weights are proved            (tools/bench_digest.py)
#   scrub-8b      what proving costs an 8B model         (tools/bench_scrub.py)
#   scrub-small   the same of a small one; `scrub` is both
#   kernels       tests of kernels, residency and device that need a GPU
#   worker        tests of a sealed worker and of flipped bits; needs the real model, see tools/fetch_model.py
#
# Environment: PYTHON, the Python that has orcd-jax's packages (python); OUT, where logs and JSON files go
# (gpu-results); LIMIT_S, the most seconds of any section, instead of its own. Nothing falls back to a CPU.
# Exit code: 0 when all passed, 1 when one did not, 2 for a section that is not there.
set -uo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

readonly SECTIONS=(digest scrub-8b scrub-small kernels worker)
readonly SHOWN_LINES=30

case "${1:-}" in
  -h | --help)
    sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

# The sections asked for: `scrub` means every one whose name begins with `scrub-`.
wanted=()
for argument in "${@:-all}"; do
  known=no
  for name in "${SECTIONS[@]}"; do
    if [[ "${argument}" == all || "${argument}" == "${name}" || "${argument}" == "${name%%-*}" ]]; then
      known=yes
      wanted+=("${name}")
    fi
  done
  [[ "${known}" == yes ]] || fail "there is no section ${argument}" "choose from: all ${SECTIONS[*]}" 2
done

PYTHON="${PYTHON:-python}"
command -v "${PYTHON}" >/dev/null 2>&1 || fail "${PYTHON} is not there" "name a Python: PYTHON=/path/to/python3"
command -v timeout >/dev/null 2>&1 || fail "the command timeout is not there" "install GNU coreutils"
OUT="${OUT:-gpu-results}"
mkdir -p "${OUT}" 2>/dev/null || fail "${OUT} cannot be made" "choose another folder: OUT=/some/folder"
OUT="$(cd "${OUT}" && pwd)"
cd "${ROOT}" || exit 1
export PYTHONPATH="${ROOT}${PYTHONPATH:+:${PYTHONPATH}}" PYTHONUNBUFFERED=1 JAX_PLATFORMS=cuda REQUIRE_REAL_GPU=1

child="" failures=0 rows=()

summary() {
  {
    printf '%-12s %-16s %6s  %s\n' section result s "last line"
    ((${#rows[@]} == 0)) || printf '%s\n' "${rows[@]}"
    printf '%d s, %d of %d sections did not pass\n' \
      "${SECONDS}" "$((failures + ${#wanted[@]} - ${#rows[@]}))" "${#wanted[@]}"
  } | tee "${OUT}/summary.txt"
}

interrupted() {
  trap '' INT TERM HUP
  if [[ -n "${child}" ]]; then
    kill -TERM "${child}" 2>/dev/null # timeout passes it on to all that it started
    wait "${child}"
  fi
  summary
  exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP

# run NAME SECONDS COMMAND…: a section, if it is wanted. Sections that share the first word of their name share a log.
run() {
  local name="$1" limit="${LIMIT_S:-$2}" log="${OUT}/${1%%-*}.log" began="${SECONDS}" status=0 result
  shift 2
  printf '\n== %s (at most %s s)\n' "${name}" "${limit}"
  printf '== %s: %s\n' "${name}" "$*" >>"${log}"
  local before
  before="$(wc -l <"${log}")"
  timeout --kill-after=10 "${limit}" "$@" >>"${log}" 2>&1 </dev/null &
  child=$!
  wait "${child}" || status=$?
  child=""
  case "${status}" in
    0) result=passed ;;
    124 | 137) result="TIMED OUT" ;;
    *) result="FAILED (${status})" ;;
  esac
  ((status == 0)) || failures=$((failures + 1))
  tail -n "+$((before + 1))" "${log}" | tail -n "${SHOWN_LINES}"
  rows+=("$(printf '%-12s %-16s %6d  %s' "${name}" "${result}" "$((SECONDS - began))" "$(tail -n 1 "${log}")")")
}

for name in "${wanted[@]}"; do rm -f "${OUT}/${name%%-*}.log" "${OUT}/${name}.json"; done
tests=("${PYTHON}" -m pytest -q -s --durations=10 -p no:cacheprovider)
for name in "${wanted[@]}"; do
  case "${name}" in
    digest) run digest 240 "${PYTHON}" tools/bench_digest.py --json="${OUT}/digest.json" ;;
    scrub-8b)
      run scrub-8b 270 "${PYTHON}" tools/bench_scrub.py --model=8b --streams=1,8,64 --rounds=6 --seconds=210 \
        --json="${OUT}/scrub-8b.json"
      ;;
    scrub-small)
      run scrub-small 120 "${PYTHON}" tools/bench_scrub.py --model=small --streams=8 --rounds=5 --seconds=90 \
        --json="${OUT}/scrub-small.json"
      ;;
    # The first tests of a process see the device as it is when nobody has used it: residency, and the largest worker.
    kernels) run kernels 200 "${tests[@]}" -m gpu tests/residency tests/kernels/test_sha256.py tests/device ;;
    worker)
      run worker 330 "${tests[@]}" -m "gpu or not gpu" tests/worker/test_sealed_gpu.py tests/worker/test_bit_flips.py
      ;;
  esac
done

printf '\n'
summary
((failures == 0))
