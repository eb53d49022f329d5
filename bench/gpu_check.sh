#!/usr/bin/env bash
# Build, test, sanitize and time the CUDA part on this machine's GPU; the stages' limits add up to nine minutes:
#
#     bench/gpu_check.sh OUT [STAGE...]
#
# STAGE: kernels, tests, memcheck, racecheck, initcheck, prepare, benchmarks, counters; all of them where none is named,
# and the build in any case. OUT gets a log of every stage, summary.json and summary.md. The exit status is 0 when every
# stage passed; a stage that fails stops no other, but without a build there is none. Nothing is downloaded: torch,
# numpy, pytest, pytest-benchmark, setuptools and what else the package needs come from PYTHON (python3), nvcc,
# compute-sanitizer and ncu from the CUDA toolkit. Tests that need a Python package which is missing are left out, and
# the summary names them.
#
# The package is installed into a temporary folder, not into the environment, and the tests and benchmarks run from a
# copy beside it, where the sources cannot be imported in its stead. LOCALLIP_COMMIT names the commit where this is no
# git checkout.
#
# The functions run in a shell of their own, by `timeout`:
# shellcheck disable=SC2016,SC2329
set -uo pipefail

if [ $# -lt 1 ]; then
  echo "usage: bench/gpu_check.sh OUT [STAGE...]" >&2
  exit 2
fi
every=(kernels tests memcheck racecheck initcheck prepare benchmarks counters)
asked=("${@:2}")
[ ${#asked[@]} -gt 0 ] || asked=("${every[@]}")

stop() {
  echo "gpu_check: $1" >&2
  exit 2
}

for name in "${asked[@]}"; do
  [[ " ${every[*]} " == *" $name "* ]] || stop "STAGE: got $name, want any of ${every[*]}"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
[ -n "$(nvidia-smi -L 2>/dev/null)" ] || stop "nvidia-smi lists no GPU: this needs a machine with an NVIDIA GPU"
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) ||
  stop "$python has no torch that can use the GPU (PYTHON names another interpreter)"
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # behind what is there: nvcc on PATH may be a wrapper that stands alone

mkdir -p "$1" || stop "cannot write to $1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
# killed, it leaves nothing running: `timeout` gives what it runs a process group of its own, and hands signals on
# shellcheck disable=SC2046
trap 'kill $(cat "$work"/stages/*.pid 2>/dev/null) 2>/dev/null; rm -rf "$work"' EXIT
trap 'exit 143' TERM INT
mkdir "$work/stages" "$work/tree"
cp -R "$root"/{bench,tests,build_support,csrc,pyproject.toml} "$work/tree"
commit=
[ -e "$root/.git" ] && commit=$(git -C "$root" describe --always --dirty --abbrev=40 '--exclude=*' 2>/dev/null)
LOCALLIP_COMMIT=${commit:-${LOCALLIP_COMMIT:-unknown}}
export python work LOCALLIP_COMMIT PATH PYTHONUNBUFFERED=1

# stage NAME SECONDS COMMAND...: run within the time limit, if it was asked for, its output in OUT/NAME.log, its outcome
# in the summary
stage() {
  local name=$1 limit=$2 start=$SECONDS status=0 result=passed note
  shift 2
  [[ $name == build || " ${asked[*]} " == *" $name "* ]] || return 0
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null &
  echo $! >"$work/stages/$name.pid"
  wait $! || status=$?
  rm -f "$work/stages/$name.pid"
  case $status in
    0) ;;
    124 | 137) result="timed out" ;;
    *) result=failed ;;
  esac
  note=$(tail -n 1 "$out/$name.log" | tr '\t|' '  ' | cut -c 1-200)
  printf '%s\t%s\t%d\t%s\n' "$name" "$result" $((SECONDS - start)) "$note" >"$work/stages/$name"
  echo "$name: $result after $((SECONDS - start)) s"
}

build() {
  cd "$1" || return
  LOCALLIP_CUDA=1 TORCH_CUDA_ARCH_LIST=$2 \
    "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$work/site" --verbose . || return
  nvcc -std=c++17 -arch="sm_${2/./}" "$work/tree/bench/planted_errors.cu" -o "$work/planted" ||
    echo "the planted errors do not compile: no sanitizer can be trusted"
  cd "$work/tree" && PYTHONPATH=$work/site "$python" -c 'import locallip_cuda; print(locallip_cuda.build_info())'
}

kernels() {
  LOCALLIP_TEST_DEVICE=cuda "$python" -m pytest -q -p no:cacheprovider tests/kernels
}

# The tests that run on every device, those on the GPU, over several processes where pytest-xdist is there.
tests() {
  local files parallel=() status
  "$python" - >"$work/device_tests" 2>"$work/left_out" <<'END' || return
import importlib, sys
from pathlib import Path

sys.path[:0] = ["tests", "build_support", "."]
for path in sorted(Path("tests").glob("test_*.py")):
    if "DEVICES" in path.read_text() or "is_available" in path.read_text():
        try:
            importlib.import_module(path.stem)
        except ModuleNotFoundError as error:
            print(f"{path.name} needs {error.name}", file=sys.stderr)
            continue
        except Exception:  # pytest will say what is wrong
            pass
        print(path)
END
  mapfile -t files <"$work/device_tests"
  # nproc takes OMP_NUM_THREADS for the number of processors
  local processors && processors=$(env -u OMP_NUM_THREADS nproc)
  "$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$((processors > 6 ? processors - 4 : 1))" --dist worksteal)
  # "gpu": tests that need one and have no device in their names; those of this script's own parts are none
  # by name: a run that is cut short must say what failed
  "$python" -m pytest -v -p no:cacheprovider "${parallel[@]}" -k "(cuda or gpu) and not test_bench" "${files[@]}" |
    tee "$work/tests.txt"
  status=${PIPESTATUS[0]}
  [ -s "$work/left_out" ] && echo "$(tail -n 1 "$work/tests.txt"); left out: $(paste -s -d ';' "$work/left_out")"
  return "$status"
}

# sanitize TOOL: whatever it reports of a kernel of ours is an error; of torch's own kernels it may say what it likes.
sanitize() {
  local tool=$1 filter chosen=none status few=()
  local ours='^=========.*locallip'
  # Both spellings are in use. initcheck has to see what torch's kernels write, and is slow for it: a few tests do.
  local filters=("--kernel-regex kns=locallip" "--kernel-name kernel_substring=locallip" "")
  if [ "$tool" = initcheck ]; then
    filters=("")
    few=(-k "(test_convolution and random) or (test_dense and random) or test_start or (float32 and relu and 34)")
  fi
  for filter in "${filters[@]}"; do
    # shellcheck disable=SC2086  # two words
    if compute-sanitizer --tool "$tool" --show-backtrace no $filter "$work/planted" "$tool" | grep "$ours" &&
      ! compute-sanitizer --tool "$tool" --show-backtrace no $filter "$work/planted" none | grep "$ours"; then
      chosen=$filter
      break
    fi
  done
  if [ "$chosen" = none ]; then
    echo "$tool does not find the planted error, or finds one where there is none"
    return 1
  fi
  echo "$tool finds the planted error (filter: ${chosen:-none}); now the kernel tests"
  # shellcheck disable=SC2086
  LOCALLIP_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --show-backtrace no --report-api-errors no --print-limit 100000 $chosen \
    "$python" -m pytest -x -q -p no:cacheprovider "${few[@]}" tests/kernels 2>&1 | tee "$work/$tool.txt"
  status=${PIPESTATUS[0]}
  if grep -q "$ours" "$work/$tool.txt"; then
    echo "$tool: $(grep -c "$ours" "$work/$tool.txt") lines about kernels of locallip"
    return 1
  fi
  echo "$tool: nothing about kernels of locallip; exit status of the tests under it: $status"
  return "$status"
}

# What the hardware counts of one launch of each kernel, at sizes that are timed; a launch takes some 18 passes.
counters() {
  command -v ncu >/dev/null || { echo "no ncu on PATH"; return 1; }
  ncu --profile-from-start off --clock-control none --kernel-name-base mangled --kernel-name regex:locallip \
    --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats \
    --section InstructionStats --section MemoryWorkloadAnalysis \
    "$python" -m bench --launch
}

export -f build kernels tests sanitize counters
stages=(build)
stage build 165 bash -c 'build "$@"' build "$root" "$capability"
cd "$work/tree" || exit
if grep -q $'\tpassed\t' "$work/stages/build"; then
  export PYTHONPATH=$work/site OMP_NUM_THREADS=1
  export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
  # All at once: what they need most is the host. The benchmarks have the machine to themselves.
  stage kernels 150 bash -c kernels &
  stage tests 150 bash -c tests &
  for tool in memcheck racecheck initcheck; do
    stage "$tool" 150 bash -c 'sanitize "$1"' sanitize "$tool" &
  done
  stage prepare 150 "$python" -m bench --prepare &
  wait
  # without "closeness": it trains networks for minutes, and what it shows is no matter of the GPU
  stage benchmarks 145 "$python" -m bench -k "not closeness" --seconds 120 --output "$work/benchmarks.json"
  stage counters 85 bash -c counters
  stages+=("${asked[@]}")
else
  tail -n 20 "$out/build.log"
fi

passed=0
for name in "${stages[@]}"; do
  cat "$work/stages/$name" >>"$work/stages.tsv"
  grep -q $'\tpassed\t' "$work/stages/$name" || passed=1
done
"$python" -m bench --read "$work/benchmarks.json" --stages "$work/stages.tsv" --summary "$out" || passed=1
exit $passed
