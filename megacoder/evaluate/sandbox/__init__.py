"""Runs programs that nobody has read: each alone, cut off from the machine, within limits, many at once.

`host.Sandbox` is the entry point. It starts workers (`launcher`), each in namespaces of its own (made there, or by
bubblewrap) with a read-only view of the system (`view`). A worker starts one program at a time without any privilege
(`confine`), counts what it uses, says how it ended and kills whatever it left running (`overseer`). `kernel` holds the
system calls that Python lacks, `program` what goes in and out, `languages` how programs are compiled and run.

No module here imports torch, and those that run inside import only the standard library, so that workers start fast.
"""
