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
OPS = sorted(path.stem.removesuffix("_torch") for path in ROOT.glob("csrc/*/*_torch.cpp") if path.with_name(
    path.name.replace("_torch.cpp", "_cpu.cpp")
).exists())
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


def number_of(arch: str) -> str:
    return re.sub(r"\D", "", arch)


def build(folder, arch: str = "sm_90", jobs: int | None = None) -> None:
    """Compiles every csrc/*/*.cu to PTX for `arch`, that to C++ and that to objects, and links FOLDER/count.

    Does nothing if the folder was built from these sources already. By default with as many processes as cores.
    """
    folder = Path(folder).resolve()
    sources = sorted([*ROOT.glob("csrc/**/*"), *HERE.glob("*.*")])
    digest = hashlib.sha256(arch.encode())
    for path in sources:
        if path.is_file():
            digest.update(path.read_bytes())
    stamp = folder / "built"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("nvcc", "kernels", "objects"):
        (folder / name).mkdir(parents=True)
    cuda_files = [path for path in ROOT.glob("csrc/*/*.cu")]
    include = ["-isystem", cuda_include(), "-I", ROOT / "csrc", "-I", HERE]
    number = number_of(arch)
    nvcc = [find_nvcc(), "-std=c++17", "-O3", "-DUSE_CUDA", "-cudart", "none", "-Xcompiler", "-fPIC"]
    nvcc += ["-gencode", f"arch=compute_{number},code=compute_{number}", "--keep", "--keep-dir", folder / "nvcc"]
    run_all([[*nvcc, "-c", path, "-o", folder / f"objects/{path.stem}.cu.o"] for path in cuda_files], jobs)
    run(sys.executable, HERE / "translate.py", folder / "kernels", *(folder / f"nvcc/{p.stem}.ptx" for p in cuda_files))
    commands = [
        [*CXX, *KERNEL_OPTIONS, "-I", HERE, "-c", path, "-o", folder / f"objects/{path.stem}.o"]
        for path in sorted((folder / "kernels").glob("*.cpp"), key=lambda path: -path.stat().st_size)
    ]
    for name in ("runtime", "counting", "fake_cudart", "count"):
        options = ["-O2", "-Wall", f"-DFAKE_ARCHITECTURE={number}", *include]
        target = folder / (f"{name}.o" if name == "count" else f"objects/{name}.o")
        commands.append([*CXX, *options, "-c", HERE / f"{name}.cpp", "-o", target])
    run_all(commands, jobs)
    run("g++", folder / "count.o", *(folder / "objects").glob("*.o"), "-o", folder / "count")
    stamp.write_text(digest.hexdigest())


def build_tests(folder, jobs: int | None = None) -> None:
    """After build(): for each test of an op in tests/csrc, FOLDER/test_OP_kernels, which launches the kernels itself and
    has its arrays between guard pages, and FOLDER/test_OP_launchers, which calls the launchers of csrc.
    """
    folder = Path(folder).resolve()
    options = [*CXX, "-O0", "-w", "-isystem", cuda_include()]
    options += ['-DCUDA_EMULATOR_H="%s"' % (ROOT / "tests/csrc/cuda_emulator.h")]
    options += ['-DSOFT_ATTENTION_LAUNCH_H="%s"' % (ROOT / "csrc/soft_attention/soft_attention_launch.h")]
    commands = [[*options, "-c", HERE / "guarded_new.cpp", "-o", folder / "guarded_new.o"]]
    for op in OPS:
        source = ROOT / f"csrc/{op}/{op}_cpu.cpp"
        commands.append([*options, "-DATTNCAP_ISA=baseline", "-c", source, "-o", folder / f"cpu_{op}.o"])
        shutil.copy(ROOT / f"tests/csrc/test_{op}.cpp", folder)  # away from the emulator that it would include
        for how, stand_in in ("kernels", HERE / "emulator"), ("launchers", HERE / "launchers"):
            include = ["-I", stand_in, "-I", ROOT / "csrc", "-I", ROOT / "tests/csrc"]
            target = folder / f"test_{op}_{how}.o"
            commands.append([*options, *include, "-c", folder / f"test_{op}.cpp", "-o", target])
    run_all(commands, jobs)
    common = [*(folder / "objects").glob("*.o"), *(folder / f"cpu_{op}.o" for op in OPS), "-ldl", "-rdynamic", "-o"]
    for op in OPS:
        kernels, launchers = folder / f"test_{op}_kernels", folder / f"test_{op}_launchers"
        run("g++", f"{kernels}.o", folder / "guarded_new.o", *common, kernels)
        run("g++", f"{launchers}.o", *common, launchers)


def build_package(folder, jobs: int | None = None) -> Path:
    """After build(): a copy of the package whose CPU ops are the code of the CUDA library, on PTX. Returns the folder to
    put on PYTHONPATH.
    """
    import torch

    folder = Path(folder).resolve()
    torch_folder = Path(torch.__file__).parent
    package = folder / "python/attncap"
    shutil.copytree(ROOT / "attncap", package, ignore=shutil.ignore_patterns("libattncap_*", "__pycache__"))
    options = [*CXX, "-O0", "-w", "-isystem", torch_folder / "include", "-isystem", cuda_include(), "-I", ROOT / "csrc"]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    commands, objects = [], []
    for path in [*ROOT.glob("csrc/*/*_torch.cpp"), ROOT / "csrc/library.cpp"]:
        objects.append(folder / f"{path.stem}.o")
        as_cpu = ["-include", HERE / "as_cpu.h"] if path.stem.removesuffix("_torch") in OPS else []
        commands.append([*options, *as_cpu, "-c", path, "-o", objects[-1]])
    run_all(commands, jobs)
    libraries = ["-L", torch_folder / "lib", "-ltorch_cpu", "-lc10"]
    target = package / "lib/libattncap_cpu.so"
    run("g++", "-shared", "-Wl,-Bsymbolic", *objects, *(folder / "objects").glob("*.o"), *libraries, "-o", target)
    return package.parent


def count(folder, case: list[str], processors: int = 132) -> list[dict]:
    """Runs a launcher on what build() made, as on a GPU with this many multiprocessors; a dict for each kernel launch.

    Cases; ACTIVATION is tanh or relu, and DTYPE one of float32, bfloat16, float16 and (but for beam_search_step) float64:

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
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "counts"
        environment = {**os.environ, "PTX_COUNTS": str(file), "PTX_PROCESSORS": str(processors)}
        run(Path(folder) / "count", *case, env=environment)
        return [json.loads(line) for line in file.read_text().splitlines()]


def resources(folder, arch: str = "sm_90") -> dict[str, dict]:
    """What ptxas says of the PTX that build() kept, for `arch`: by mangled name, `registers` of a thread, bytes of
    `spill_stores`, `spill_loads` and `stack` of a thread and of static `shared` memory of a block, and the launch bounds,
    `threads` of a block (1024 if none is given) and least `blocks` of a multiprocessor.
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
