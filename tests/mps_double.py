"""Doubles of NVIDIA's programs, for machines without a GPU: the MPS control program, and the driver's library.

The program is one: `-d` starts a daemon that listens on a socket in CUDA_MPS_PIPE_DIRECTORY, waits for its clients when
it is told to quit, and writes its pid file; without words it passes commands on to that daemon. The library shows the
GPUs in FAKE_GPUS as CUDA_VISIBLE_DEVICES says, connects to the daemon as the real one does, and fails where it cannot.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

GPUS = ("11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")

PROGRAM = r"""#!PYTHON
import json, os, socket, sys, time

folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", os.environ["FAKE_DEFAULT_PIPES"])

def record(what, **more):
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps({"what": what, "pipes": folder, **more}) + "\n")

def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False

def serve(listening):
    clients, quitting = set(), False
    listening.settimeout(0.02)
    while not (quitting and not any(map(alive, clients))):
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            continue
        with connection:
            word, *more = connection.recv(1000).decode().split()
            if word == "client":
                clients.add(int(more[0]))
                connection.send(b"\n")
            else:
                quitting |= word == "quit"
                servers = f"{os.getpid()}\n" if clients and word == "get_server_list" else "\n"
                connection.send(servers.encode())
    record("daemon ended")

def reached():
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(folder + "/control")
    except OSError:
        sys.exit("Cannot find MPS control daemon process")
    return connection

if "-d" in sys.argv:
    record("start", gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), logs=os.environ.get("CUDA_MPS_LOG_DIRECTORY"))
    if "FAKE_REFUSAL" in os.environ:
        print(os.environ["FAKE_REFUSAL"])
        sys.exit(1)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(folder + "/control")
    listening.listen()
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        with open(folder + "/nvidia-cuda-mps-control.pid", "w") as file:
            file.write(str(os.getpid()))
        os.write(writer, b".")
        for number in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        serve(listening)
        os._exit(0)
    os.read(reader, 1)
else:
    for command in sys.stdin.read().split("\n"):
        if command:
            with reached() as connection:
                record(command)
                connection.send(command.encode())
                print(connection.recv(1000).decode(), end="")
"""

LIBRARY = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static char uuids[8][40];
static int count;

static void show(const char *gpus, const char *visible) {
    char all[8][40], text[2000];
    int known = 0;
    snprintf(text, sizeof text, "%s", gpus);
    for (char *part = strtok(text, ","); part; part = strtok(NULL, ","))
        snprintf(all[known++], 40, "%s", part);
    if (!visible) {
        memcpy(uuids, all, sizeof all);
        count = known;
        return;
    }
    snprintf(text, sizeof text, "%s", visible);
    for (char *part = strtok(text, ","); part; part = strtok(NULL, ",")) {
        int found = -1;
        for (int k = 0; k < known; k++)
            if (!strncmp(part, "GPU-", 4) ? !strcmp(part + 4, all[k]) : atoi(part) == k) found = k;
        if (found < 0) return;
        strcpy(uuids[count++], all[found]);
    }
}

int cuInit(unsigned flags) {
    const char *gpus = getenv("FAKE_GPUS"), *pipes = getenv("CUDA_MPS_PIPE_DIRECTORY");
    if (getenv("FAKE_BROKEN_DRIVER")) return 999;
    show(gpus ? gpus : "", getenv("CUDA_VISIBLE_DEVICES"));
    if (!count) return 100;
    int theirs = !pipes;  /* a daemon of somebody else's, if there is one */
    if (theirs) pipes = getenv("FAKE_DEFAULT_PIPES");
    if (pipes && !getenv("FAKE_DEAF_DRIVER")) {
        struct sockaddr_un place = {.sun_family = AF_UNIX};
        char words[100];
        int handle = socket(AF_UNIX, SOCK_STREAM, 0);
        snprintf(place.sun_path, sizeof place.sun_path, "%s/control", pipes);
        if (getenv("FAKE_NO_SERVER") && !theirs) return 805;
        if (connect(handle, (struct sockaddr *)&place, sizeof place)) return theirs ? 0 : 805;
        snprintf(words, sizeof words, "client %d", getpid());
        write(handle, words, strlen(words));
        read(handle, words, 1);
        close(handle);
    }
    return 0;
}
int cuDeviceGetCount(int *n) { *n = count; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    int k = 0;
    for (const char *c = uuids[device]; *c; c++)
        if (*c != '-') { sscanf(c, "%2hhx", uuid + k++); c++; }
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return 0; }
int cuGetErrorString(int status, const char **text) {
    *text = status == 805 ? "MPS client failed to connect" : "unknown error";
    return 0;
}
"""


def compile_driver(folder: Path) -> Path:
    """Compiles the double of libcuda.so.1 into `folder`."""
    source = folder / "cuda.c"
    source.write_text(LIBRARY)
    words = ["cc", "-shared", "-fPIC", "-w", "-o", str(folder / "libcuda.so.1"), str(source)]
    subprocess.run(words, check=True, timeout=60)
    return folder


class Doubles:
    """The doubles, installed below a folder.

    Attributes:
        env: variables that make a process find them: one GPU, MPS's program on PATH, no daemon.
    """

    def __init__(self, folder: Path, driver: Path):
        self.program, self.log, pipes = folder / "bin" / "nvidia-cuda-mps-control", folder / "log", folder / "pipes"
        self.program.parent.mkdir()
        pipes.mkdir()
        self.program.write_text(PROGRAM.replace("PYTHON", f"{sys.executable} -S", 1))
        self.program.chmod(0o755)
        self.log.touch()
        self.env = {
            "PATH": f"{self.program.parent}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(driver),
            "FAKE_GPUS": GPUS[0], "FAKE_LOG": str(self.log), "FAKE_DEFAULT_PIPES": str(pipes),
        }  # fmt: skip

    def records(self, *kinds: str) -> list[dict]:
        """What has happened, in order; of these kinds alone, if any are named."""
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [record for record in found if not kinds or record["what"] in kinds]
