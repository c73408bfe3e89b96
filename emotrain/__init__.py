"""emotrain: pretrain modular Mixture-of-Experts language models (EMO, arXiv 2605.06663).

Shapes are written as suffixes of a name, one letter an axis, everywhere in this repository:

    B  sequences (rows) of a micro-batch        G  documents of a micro-batch
    S  tokens of a sequence                     N  routed experts
    T  tokens of a micro-batch, T = B * S       E  experts of a layer, E = N + M
    D  model width                              K  routed experts chosen for a token
    H  hidden width of one expert               L  layers
    V  vocabulary                               R  routed slots, R = T * K
    F  2 * H, gate and up side by side          M  shared experts
    C  attention head width                     A  attention heads
    J  inner width of a GEMM, H or F;           P  tiles or partial sums of a kernel
       groups of documents in an evaluation     W  ranks that exchange tokens
    U  documents of an evaluation               O  rows that a rank sends
    X  any width, Y  another one                I  rows that a rank receives

A digit is an axis of that length (`send_W2`), a small letter a part of its axis (`hidden_tD`).
"""

__version__ = "0.1.0"
