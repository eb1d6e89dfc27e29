"""Options of the section ``dist_params``: processes and how they communicate."""

from utils.config.checkers import AUTO_ON_OFF, Bool, Choice, Float, Int, Word
from utils.config.options import EXECUTION, PLACE, Option

OPTIONS = {
    "distributed": Option(Bool(), default=True, role=EXECUTION, meaning="false = one process, whatever nproc says"),
    "nproc": Option(
        Int(0, 1024), default=0, role=EXECUTION, meaning="processes on this machine; 0 = one per GPU, or one on the CPU"
    ),
    "backend": Option(
        Choice(["auto", "gloo", "nccl"]),
        default="auto",
        role=EXECUTION,
        meaning="communication library; auto = nccl with a GPU per process, gloo otherwise",
    ),
    "address": Option(
        Word(), default="localhost", role=PLACE, needs_several="processes", meaning="host at which the processes meet"
    ),
    "port": Option(
        Int(0, 65535), default=0, role=PLACE, needs_several="processes", meaning="port at address; 0 = any free one"
    ),
    "threads": Option(
        Int(0, 1024),
        default=0,
        role=EXECUTION,
        meaning="CPU threads per process; 0 = share of cores, 1 for small MLPs",
    ),
    "sync_bn": Option(
        Bool(), default=False, needs_several="processes", meaning="take BatchNorm statistics over all processes"
    ),
    "sparse_allreduce": Option(
        Choice(AUTO_ON_OFF),
        default="off",
        role=EXECUTION,
        needs_several="processes",
        meaning="send the gradients of kept weights only; auto = with gloo, at densities where it pays",
    ),
    "wire": Option(
        Choice(["fp32", "bf16"]),
        default="fp32",
        needs_several="processes",
        meaning="number type in which gradients are sent; bf16 halves the bytes and rounds the gradients",
    ),
    "timeout_minutes": Option(
        Float("(0,]"),
        default=10.0,
        unit="minutes",
        role=EXECUTION,
        needs_several="processes",
        meaning="time limit of one process's wait for another",
    ),
}
