"""Which policy does a server really run? Open `decide.py` first."""

from swaa_jax.verify.ask import ask_model, ask_server, only_model
from swaa_jax.verify.candidates import RECORDED, Candidate, candidates
from swaa_jax.verify.decide import Evidence, Verdict, decide
from swaa_jax.verify.paths import Option, Path, Reply, Step
from swaa_jax.verify.probes import ProbeOptions, make_record
from swaa_jax.verify.record import Probe, Record, read_record, write_record

__all__ = [
    "RECORDED",
    "Candidate",
    "Evidence",
    "Option",
    "Path",
    "Probe",
    "ProbeOptions",
    "Record",
    "Reply",
    "Step",
    "Verdict",
    "ask_model",
    "ask_server",
    "candidates",
    "decide",
    "make_record",
    "only_model",
    "read_record",
    "write_record",
]
