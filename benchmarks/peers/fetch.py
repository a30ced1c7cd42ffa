"""The peers, with everything that they need: in an environment of their own, or packed for a machine without a network.

python benchmarks/peers/fetch.py install [FOLDER]    an environment in FOLDER (.peers/venv), by way of pip
python benchmarks/peers/fetch.py [FOLDER]            one file, FOLDER/peers.tar.gz (.peers)

The file: wheels for CPython 3.12 on Linux x86-64 are downloaded without dependencies (`wheels.txt` names them all) and
unpacked into `site/`; TRL 1.12, the last with a PPO, is unpacked apart, into `trl112/`. What a CUDA 13.0 machine does
not read is left out, so that the whole packs to about 26 MB. On that machine:

    mkdir -p .peers/unpacked && tar xzf .peers/peers.tar.gz -C .peers/unpacked
    python -m benchmarks.dpo peers=.peers/unpacked
"""

import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

WHEELS = Path(__file__).with_name("wheels.txt")
DEVICE = Path(__file__).with_name("device.txt")
PPO = "trl==1.12.0"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LEFT_OUT = ("studio/*", "*.data/scripts/*")
"""Paths in a wheel that nothing here reads: a web application, command lines."""
LIBRARIES, KEPT = "bitsandbytes/libbitsandbytes_*.so", "bitsandbytes/libbitsandbytes_cuda130.so"


def main(folder: Path) -> None:
    """Downloads, unpacks, leaves out, packs; prints the size of what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for place, wanted in (("site", ["-r", str(WHEELS)]), ("trl112", [PPO])):
            wheels = download(wanted, Path(scratch) / f"wheels-{place}")
            for wheel in wheels:
                unpack(wheel, Path(scratch) / place)
            print(f"{place}: {len(wheels)} wheels")
        packed = folder / "peers.tar.gz"
        with tarfile.open(packed, "w:gz") as tar:
            for place in ("site", "trl112"):
                tar.add(Path(scratch) / place, place)
    print(f"{packed}: {packed.stat().st_size / 2**20:.1f} MiB")


def install(folder: Path) -> None:
    """Makes the environment: what `wheels.txt` takes for granted, then the wheels themselves, as they ran together.

    It is there whole or not at all.
    """
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = (["-r", str(DEVICE)], ["--no-deps", "-r", str(WHEELS)], ["--no-deps", "--target", f"{folder}/trl112", PPO])
    for words in steps:
        if subprocess.run([*pip, *words], check=False).returncode:
            shutil.rmtree(folder)
            sys.exit(f"{folder} could not be made: pip failed at {' '.join(words)}")


def download(wanted: list[str], folder: Path) -> list[Path]:
    """The wheels that pip finds for the other machine, whatever this one is."""
    kind = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *kind, *platforms, "-d", str(folder), *wanted]
    subprocess.run(command, check=True)
    return sorted(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> None:
    """Every file of the wheel that is read there, under the folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if is_read(name)])


def is_read(name: str) -> bool:
    """Whether a path in a wheel is of use on a CUDA 13.0 machine."""
    if fnmatch.fnmatch(name, LIBRARIES):
        return name == KEPT
    return not any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["install"]:
        install(Path(sys.argv[2] if len(sys.argv) > 2 else ".peers/venv"))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ".peers"))
