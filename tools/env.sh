# Sourced by the tools: finds a Python, makes .venv from a lock, and fails with what to do next.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${ORCD_VENV:-${ROOT}/.venv}"

say() { printf '%s\n' "$*" >&2; }

# fail WHAT TO_DO [EXIT_CODE]
fail() {
  say "error: $1"
  say "       $2"
  exit "${3:-1}"
}

# The first Python of a supported version, tried by running it: a name on PATH may be a shim for nothing.
find_python() {
  local candidate
  for candidate in ${ORCD_PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if "${candidate}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1; then
      command -v "${candidate}"
      return
    fi
  done
  fail "no Python 3.11, 3.12 or 3.13 was found on PATH" \
    "install one (for example: apt-get install python3 python3-venv) or name it: ORCD_PYTHON=/path/to/python3.11" 1
}

# Two lines that change when what is installed should: one of the Python and the lock, one of the project itself.
stamp_of() {
  "$1" -c '
import hashlib, pathlib, sys
root, lock = pathlib.Path(sys.argv[1]), sys.argv[2]
for parts in (sys.version, sys.prefix, lock), (str(root), "pyproject.toml"):
    digest = hashlib.sha256("\0".join(parts).encode())
    digest.update((root / parts[-1]).read_bytes())
    print(digest.hexdigest())' "${ROOT}" "requirements/$2.txt"
}

# pip, quiet unless it fails; its complaint is then shown.
run_pip() {
  local log="${VENV}/pip.log"
  "${VENV}/bin/python" -m pip --disable-pip-version-check --no-input -qq "$@" >"${log}" 2>&1 || {
    tail -n 20 "${log}" >&2
    return 1
  }
}

# make_venv LOCK: .venv with exactly the versions of requirements/LOCK.txt and this package, in place.
# An environment made from the dev lock also serves where the runtime lock is asked for. An interrupted set-up leaves no
# stamp and is made anew. A .venv that somebody else made is left alone.
make_venv() {
  local lock="$1" python name
  python="$(find_python)" || exit $?
  if command -v flock >/dev/null 2>&1; then
    # Two of these tools at once: the second waits for the first one's set-up.
    exec 9>"${VENV}.lock" || fail "${ROOT} cannot be written" "check its permissions and the disk space"
    flock 9
  fi
  local made="" stamp=""
  for name in "${lock}" dev; do
    stamp="$(stamp_of "${python}" "${name}")"
    if [[ -f "${VENV}/orcd.${name}" && "$(head -n 1 "${VENV}/orcd.${name}")" == "${stamp%%$'\n'*}" ]]; then
      made="${name}"
      break
    fi
  done
  if [[ -z "${made}" ]]; then
    install_venv "${python}" "${lock}"
    made="${lock}" stamp="$(stamp_of "${python}" "${lock}")"
  fi
  if [[ "$(cat "${VENV}/orcd.${made}" 2>/dev/null)" != "${stamp}" ]]; then
    run_pip install --no-deps --no-build-isolation --no-index -e "${ROOT}" ||
      fail "orcd-jax itself could not be installed into ${VENV}" "the lines above say why"
    printf '%s\n' "${stamp}" >"${VENV}/orcd.${made}"
  fi
  exec 9>&-
}

install_venv() {
  local python="$1" lock="$2"
  if [[ -e "${VENV}" && ! -e "${VENV}/orcd.begun" ]]; then
    fail "${VENV} exists and was not made by this tool" "move it away, or name another folder: ORCD_VENV=/some/folder"
  fi
  say "setting up ${VENV} (once, a few minutes) …"
  rm -rf "${VENV}"
  mkdir -p "${VENV}" && : >"${VENV}/orcd.begun" || fail "${VENV} cannot be made" "check permissions and the disk space"
  "${python}" -m venv "${VENV}" >"${VENV}/venv.log" 2>&1 ||
    fail "${python} could not make a virtual environment in ${VENV}" \
      "on Debian and Ubuntu: apt-get install python3-venv; ${VENV}/venv.log says more"
  # The lock is whole, so pip resolves nothing: an old pip would take `pydantic[email]` of a dependency for a new,
  # unpinned requirement as soon as a newer pydantic is out.
  run_pip install --no-deps --require-hashes --only-binary :all: -r "${ROOT}/requirements/${lock}.txt" ||
    fail "the packages of requirements/${lock}.txt could not be installed" \
      "check the network, the package index of 'pip config list' and the disk space (about 2 GB), then run this again"
  run_pip check || fail "requirements/${lock}.txt lacks what its packages need" "run tools/lock"
  if [[ "${lock}" == dev ]]; then
    # Not in the lock: a CPU build and a CUDA build share the version and differ in hashes. pip takes whichever its
    # configuration offers; the pure Python requirements are installed already.
    run_pip install "torch==2.13.0" ||
      fail "torch 2.13.0 could not be installed (the parity tests compare with it)" \
        "check the network and the disk space, then run this again"
  fi
}
