"""Runs the CUDA kernels without a GPU: nvcc's PTX, translated to C++ for the host. README.md says how it works.

As a command, `python ptx.py FOLDER [ARCH]` builds everything there; test_ptx.py and benchmarks use the functions.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OPS = sorted(
    path.stem.removesuffix("_torch")
    for path in ROOT.glob("csrc/*/*_torch.cpp")
    if path.with_name(path.name.replace("_torch.cpp", "_cpu.cpp")).exists()
)
CXX = ["g++", "-std=c++20", "-fPIC", "-Wno-psabi"]
# Without contraction, a * b + c is rounded twice, as PTX says. Optimising takes longer than the tests gain by it.
KERNEL_OPTIONS = ["-O0", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-exceptions", "-w"]
if platform.machine() in ("x86_64", "AMD64"):
    KERNEL_OPTIONS += ["-mfma", "-mf16c"]


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def run(*command, **options) -> str:
    """The standard output of a command; RuntimeError with all its output if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def run_all(commands: list[list], jobs: int | None):
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        list(pool.map(lambda command: run(*command), commands))


@functools.cache
def cuda_include() -> Path:
    """The folder of CUDA's headers, which nvcc knows."""
    lines = run(find_nvcc(), "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null")
    found = re.search(r'INCLUDES="-I(.*?)"', lines)
    return Path(found[1]) if found else Path(find_nvcc()).resolve().parents[1] / "include"


def build_kernels(files: list[Path], folder: Path, jobs: int | None = None) -> list[Path]:
    """The objects of these PTX files' kernels, in FOLDER."""
    run(sys.executable, HERE / "translate.py", folder, *files)
    sources = sorted(Path(folder).glob("*.cpp"), key=lambda path: -path.stat().st_size)
    commands = [[*CXX, *KERNEL_OPTIONS, "-I", HERE, "-c", path, "-o", path.with_suffix(".o")] for path in sources]
    run_all(commands, jobs)
    return [path.with_suffix(".o") for path in sources]


def compile_cuda(files: list[Path], folder: Path, arch: str, jobs: int | None = None) -> list[Path]:
    """nvcc's object, and beside it the PTX, of each file. Returns the PTX files."""
    number = number_of(arch)
    nvcc = [find_nvcc(), "-std=c++17", "-O3", "-DUSE_CUDA", "-cudart", "none", "-Xcompiler", "-fPIC"]
    nvcc += ["-gencode", f"arch=compute_{number},code=compute_{number}", "--keep", "--keep-dir", folder]
    run_all([[*nvcc, "-c", path, "-o", folder / f"{path.stem}.cu.o"] for path in files], jobs)
    return [folder / f"{path.stem}.ptx" for path in files]


def number_of(arch: str) -> str:
    return re.sub(r"\D", "", arch)


def objects(folder: Path) -> list[Path]:
    """The translated kernels, the launchers as nvcc compiled them, and what both run on."""
    return [path for name in ("kernels", "nvcc", "runtime") for path in sorted((folder / name).glob("*.o"))]


def build(folder, arch: str = "sm_90", jobs: int | None = None) -> None:
    """Compiles every csrc/*/*.cu to PTX for `arch`, that to C++ and that to objects, and links FOLDER/count.

    Does nothing if the folder was built from these sources already. By default with as many processes as cores.
    """
    folder = Path(folder).resolve()
    sources = sorted([*ROOT.glob("csrc/**/*"), *HERE.glob("*.*"), ROOT / "tests/csrc/fiber.h"])
    digest = hashlib.sha256(arch.encode())
    for path in sources:
        if path.is_file():
            digest.update(path.read_bytes())
    stamp = folder / "built"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("nvcc", "kernels", "runtime"):
        (folder / name).mkdir(parents=True)
    files = sorted(ROOT.glob("csrc/*/*.cu"))
    build_kernels(compile_cuda(files, folder / "nvcc", arch, jobs), folder / "kernels", jobs)
    options = ["-O2", "-Wall", f"-DFAKE_ARCHITECTURE={number_of(arch)}", "-isystem", cuda_include()]
    options += ["-I", ROOT / "csrc", "-I", HERE, "-I", ROOT / "tests/csrc"]
    names = ("runtime", "counting", "fake_cudart", "count")
    run_all([[*CXX, *options, "-c", HERE / f"{name}.cpp", "-o", folder / f"runtime/{name}.o"] for name in names], jobs)
    count_object = (folder / "runtime/count.o").rename(folder / "count.o")
    run("g++", count_object, *objects(folder), "-o", folder / "count")
    stamp.write_text(digest.hexdigest())


def build_tests(folder, with_launchers: bool = True, jobs: int | None = None) -> None:
    """After build(): for each test of an op in tests/csrc, FOLDER/test_OP_kernels, which launches the kernels itself
    and has its arrays between guard pages, and FOLDER/test_OP_launchers, which calls the launchers of csrc.
    """
    folder = Path(folder).resolve()
    options = [*CXX, "-O0", "-w", "-isystem", cuda_include()]
    options += [f'-DCUDA_EMULATOR_H="{ROOT / "tests/csrc/cuda_emulator.h"}"']
    options += [f'-DSOFT_ATTENTION_LAUNCH_H="{ROOT / "csrc/soft_attention/soft_attention_launch.h"}"']
    commands = [[*options, "-c", HERE / "guarded_new.cpp", "-o", folder / "guarded_new.o"]]
    for op in OPS:
        source = ROOT / f"csrc/{op}/{op}_cpu.cpp"
        commands.append([*options, "-DATTNCAP_ISA=baseline", "-c", source, "-o", folder / f"cpu_{op}.o"])
        shutil.copy(ROOT / f"tests/csrc/test_{op}.cpp", folder)  # away from the emulator that it would include
        for how in ("kernels", "launchers")[: 1 + with_launchers]:
            include = ["-I", HERE / how, "-I", ROOT / "csrc", "-I", ROOT / "tests/csrc"]
            target = folder / f"test_{op}_{how}.o"
            commands.append([*options, *include, "-c", folder / f"test_{op}.cpp", "-o", target])
    run_all(commands, jobs)
    for op in OPS:
        link_test(folder, op, folder / f"test_{op}_kernels")
        if with_launchers:
            own = [folder / f"test_{op}_launchers.o", folder / f"cpu_{op}.o"]
            run("g++", *own, *objects(folder), "-o", folder / f"test_{op}_launchers")


def link_test(folder: Path, op: str, target: Path, replaced: list[Path] = ()) -> Path:
    """Links test_OP_kernels, with these objects of kernels in place of those of the same names."""
    others = [path for path in objects(folder) if path.name not in {path.name for path in replaced}]
    own = [folder / f"test_{op}_kernels.o", folder / f"cpu_{op}.o", folder / "guarded_new.o"]
    run("g++", *own, *others, *replaced, "-ldl", "-rdynamic", "-o", target)
    return target


def build_faults(folder, target, jobs: int | None = None) -> Path:
    """After build() and build_tests(): the program of faults.cu, in the folder TARGET."""
    folder, target = Path(folder), Path(target)
    kernels = build_kernels(compile_cuda([HERE / "faults.cu"], target, "sm_90"), target / "kernels", jobs)
    options = ["-DFAKE_ARCHITECTURE=90", "-isystem", cuda_include()]
    run(*CXX, *options, "-c", HERE / "fake_cudart.cpp", "-o", target / "fake_cudart.o")
    runtime = [folder / "runtime/runtime.o", folder / "runtime/counting.o", target / "fake_cudart.o"]
    own = [target / "faults.cu.o", *kernels, *runtime, folder / "guarded_new.o"]
    run("g++", *own, "-o", target / "faults")
    return target / "faults"


def build_package(folder, jobs: int | None = None) -> Path:
    """After build(): a copy of the package whose CPU ops are the code of the CUDA library, on PTX. Returns the folder
    to put on PYTHONPATH.
    """
    import torch

    folder = Path(folder).resolve()
    torch_folder = Path(torch.__file__).parent
    package = folder / "python/attncap"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "attncap", package, ignore=shutil.ignore_patterns("libattncap_*", "__pycache__"))
    options = [*CXX, "-O0", "-w", "-isystem", torch_folder / "include", "-isystem", cuda_include(), "-I", ROOT / "csrc"]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    commands, own = [], []
    for path in [*ROOT.glob("csrc/*/*_torch.cpp"), ROOT / "csrc/library.cpp"]:
        own.append(folder / f"{path.stem}.o")
        as_cpu = ["-include", HERE / "as_cpu.h"] if path.stem.removesuffix("_torch") in OPS else []
        commands.append([*options, *as_cpu, "-c", path, "-o", own[-1]])
    run_all(commands, jobs)
    libraries = ["-L", torch_folder / "lib", "-ltorch_cpu", "-lc10"]
    target = package / "lib/libattncap_cpu.so"
    run("g++", "-shared", "-Wl,-Bsymbolic", *own, *objects(folder), *libraries, "-o", target)
    return package.parent


def count(folder, case: list[str], processors: int = 132) -> list[dict]:
    """Runs a launcher on what build() made, as on a GPU with this many multiprocessors; a dict for each kernel launch.

    Cases; ACTIVATION is tanh or relu, and DTYPE float32, bfloat16, float16 or (but for beam_search_step) float64:

        soft_attention               DTYPE B K P D A ACTIVATION [gate] [mask]
        soft_attention_backward      DTYPE B K P D A ACTIVATION [gate] [keys] [features]    with the gradients of those
        soft_attention_keys_backward DTYPE B ROWS P A ACTIVATION                            ROWS of each image
        beam_search_step             DTYPE B J K V [fixed]
        lstm_step                    DTYPE N H E
        lstm_step_backward           DTYPE N H

    The keys of a dict:

        kernel, entry         name with its template arguments; mangled name
        blocks, threads, cluster, static_shared, dynamic_shared
        global_load, global_store, async_copy
            requests: accesses of a warp; sectors of 32 bytes that these ask for, each by itself; bytes that the threads
            ask for; distinct: different sectors over the launch, the least that must come from memory
        shared_load, shared_store, remote_load, remote_store (of other blocks of the cluster)
            requests, bytes; wavefronts: passes over the 32 banks; conflicts: wavefronts beyond those that an access of
            this width takes in any case
        barriers, cluster_barriers    that were completed
        instructions          PTX instructions by unit, summed over all threads. "move" costs nearly nothing once ptxas
                              has allocated registers; of "expanded", ptxas makes many instructions each
        expanded              which those are
    """
    return run_counted(Path(folder) / "count", *case, processors=processors)


def run_counted(*command, processors: int = 132) -> list[dict]:
    """The counts of each launch of a program."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "counts"
        run(*command, env={**os.environ, "PTX_COUNTS": str(file), "PTX_PROCESSORS": str(processors)})
        return [json.loads(line) for line in file.read_text().splitlines()]


def resources(folder, arch: str = "sm_90") -> dict[str, dict]:
    """What ptxas says of the PTX that build() kept, for `arch`: by mangled name, `registers` of a thread, bytes of
    `spill_stores`, `spill_loads` and `stack` of a thread and of static `shared` memory of a block, and the launch
    bounds, `threads` of a block (1024 if none is given) and least `blocks` of a multiprocessor.
    """
    found = {}
    number = number_of(arch)
    ptxas = shutil.which("ptxas", path=Path(find_nvcc()).resolve().parent) or "ptxas"
    for path in sorted((Path(folder) / "nvcc").glob("*.ptx")):
        text = path.read_text()
        output = run(ptxas, "-v", f"-arch=sm_{number}", path, "-o", "/dev/null")
        for part in output.split("Compiling entry function ")[1:]:
            name = re.match(r"'(.*?)'", part)[1]
            header = text[text.index(f".entry {name}(") :].split("{", 1)[0]
            found[name] = {
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "spill_stores": int(re.search(r"(\d+) bytes spill stores", part)[1]),
                "spill_loads": int(re.search(r"(\d+) bytes spill loads", part)[1]),
                "stack": int(re.search(r"(\d+) bytes stack frame", part)[1]),
                "shared": int((re.search(r"(\d+) bytes smem", part) or [0, 0])[1]),
                "threads": int((re.search(r"\.maxntid\s+(\d+)", header) or [0, 1024])[1]),
                "blocks": int((re.search(r"\.minnctapersm\s+(\d+)", header) or [0, 1])[1]),
            }
    return found


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        build(sys.argv[1], *sys.argv[2:3])
        build_tests(sys.argv[1])
        build_package(sys.argv[1])
