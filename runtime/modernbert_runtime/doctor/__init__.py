"""What this machine can run, proven by running it: each engine against a reference, in a process of its own.

`facts` says what the machine has, `candidates` what could run here and why the rest cannot, `worker` is the process,
`examine` runs them all and compares. It measures enough to see an engine work; `bench` measures well.
"""

from modernbert_runtime.doctor.candidates import Candidate, find_candidates
from modernbert_runtime.doctor.examine import Check, Reference, examine
from modernbert_runtime.doctor.facts import Facts, gather_facts

__all__ = ["Candidate", "Check", "Facts", "Reference", "examine", "find_candidates", "gather_facts"]
