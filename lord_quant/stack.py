# SPDX-License-Identifier: Apache-2.0
"""Decomposing and quantizing one layer together, so that the second step knows the first.

The problem. A layer y = W x + b, W (m, n), becomes ŷ = A B x′ + b̂ with A (m, r) and B (r, n) on integer grids, where x′
is what the layer really sees once everything before it was compressed. From calibration we have H = E[x′x′ᵀ],
C = E[x x′ᵀ] (centred, where a bias can absorb the means) and the means. Decomposing W and then quantizing A and B, each as
if it were a layer of its own, loses: two rounding errors of full size, neither of which knows of the other. Everything
below is closed form on H and C.

1. Anchor. We want the *dense* model's outputs from the *compressed* model's inputs. E‖W x − T x′‖² over T is least squares
   with solution T = W C H⁻¹, written

       T = W + W (C − H)(H + λI)⁻¹

   so that damping pulls towards W, not towards zero. (A layer that writes to the residual stream aims at that instead:
   `blocks/residual.py` adds to W C what the stream lacks.) Expanding the square around T, E‖W x − Ŵ x′‖² = ‖Ŵ − T‖²_H +
   const with ‖D‖²_H = tr D H Dᵀ: from here on T replaces W, and H is the only metric. (Same form for a layer that stays
   dense. Compare GPTAQ, arXiv 2504.02692.)

2. Truncate. The best rank-r approximation of T in ‖·‖_H is LoRD on T: A₀ = U, the top-r eigenvectors of T H Tᵀ, and
   B₀ = Uᵀ T. Not all outputs matter alike: with the loss's own metric G on the outputs (`sensitivity.py`; else G = I), cost
   ‖D‖²_GH = tr G D H Dᵀ and G = SᵀS, it is LoRD on S T: A₀ = S⁻¹ U, B₀ = Uᵀ S T.

3. Gauge. A B = (A R⁻¹)(R B) for every invertible R. First, AᵀA = I with the outputs in units of √diag G: A is rounded row
   by row, and the rows' errors cost Σᵢ Gᵢᵢ ‖aᵢ‖² times a power of det (B H Bᵀ), which for a given product A B is least
   when Aᵀ diag(G) A is a multiple of I. (S⁻¹ U itself would be a bad choice: it is large wherever G is small.) Second, an
   orthogonal Q is left free. In the eigenbasis the bottleneck z = B x′ has a diagonal covariance: a solver can compensate
   nothing there and rounds, worst on the few loud channels. A random rotation makes the channels alike and correlated. It
   is merged into the factors and costs nothing afterwards. Last, one scalar moves between the factors so that both have
   entries of the same size (scales are stored in float16).

4. Order and refit. Quantize one factor, then give the other its least-squares optimum *for the quantized one*, then
   quantize that. The first rounding error E is then partly absorbed:

       down first:  A = A₀ + (T H − A₀ B_q H) B_qᵀ (B_q H B_qᵀ + λI)⁻¹     what is lost of E x′ is uncorrelated with z
       up first:    B = (A_qᵀ G A_q)⁻¹ A_qᵀ G T                            what is lost of E z is G-orthogonal to range(A_q)

   (The optimum of A does not depend on G: every output has its own row.)
   Rounding noise spreads over all n inputs of B, or all m outputs of A, and all but n − r, or m − r, of these dimensions
   are absorbed. So the factor with the *smaller* free dimension goes first: up where m < n, else down; where m = n, up if
   it can be rounded as in 6, which was better on the layers tried, of one model.

5. Deflation (down first). If A will be refitted, only the part of E x′ that z cannot predict does harm. Its second moment
   is the Schur complement H_⊥ = H − H Bᵀ (B H Bᵀ)⁻¹ B H, so B is quantized in the metric H_⊥ + μ H, with a little μ to keep
   A near A₀: the solver moves its errors into directions that the refit takes back. In other words B only has to represent
   its row space.

6. Both solves are GPTQ in these metrics (H or H_⊥ + μH for B; B_q H B_qᵀ, or B H Bᵀ if up goes first, for A), polished by
   `refine`. GPTQ takes outputs as independent; in G they are not, and what one has missed others take back
   (`rounding/two_sided.py`), as Aᵀ G A says for the rows of B, and G for those of A or of a layer that stays dense. If B
   will be refitted, errors of A inside its own range do no harm, the mirror image of 5: A is rounded as G_⊥ + μ G says,
   with G_⊥ = G − G A (Aᵀ G A)⁻¹ Aᵀ G.

7. Last, b̂ = b + W μ − A_q B_q μ′.

Pivoted form. Here B holds rows of the product itself, there is no gauge to choose, and an error in one pivot output also
enters all outputs predicted from it: with P = [I; A] the metric on B's rows is N = Pᵀ G P, I + AᵀA if G = I, far from I. So
A is quantized first, B gets its optimum B = N_q⁻¹ P_qᵀ G T, and is rounded as N says, whatever is known of G: rows then
cost the diagonal of N's Cholesky factorization instead of its trace, whose product is det N, a constant over vol²: hence
pivots of large volume.

Column-pivoted form. The bottleneck is z = x′_P + C x′_N: `down` rounds only C, in H_⊥ + μH on N as in 5, for A is refitted
and takes back what z tells of; rows of C count as Aᵀ G A says, whatever is known of G. A has most weights where there are
more outputs than inputs, and is rounded once, last, as in the two-factor form. Pivoted outputs, which are rounded in all of
H, mostly have more noise there, up to three times as much, but not always: `losses/probe.py` tries both. Where there are
fewer outputs they always had less.

Failure cases. Singular H (few tokens, dead or duplicated channels): solves are damped, damping is raised until they exist;
unseen directions keep W's values. Rank 1 to full are legal; at full rank with m ≤ n `up` is square and its error is
absorbed entirely. Everything runs in the dtype of the moments; nothing given is modified.

Sources: LoRD, arXiv 2309.14021; GPTQ, arXiv 2210.17323; PIFA, arXiv 2501.19090; and as named above and in
`sensitivity.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lord_quant.config import JointConfig
from lord_quant.decompose import Factors, OutputSpectrum
from lord_quant.linalg import Note, damped_right_solve, relative_error
from lord_quant.moments import PairedMoments
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Solver, Solvers
from lord_quant.rounding.stack_forms import Objective, refined, stack_factors
from lord_quant.rounding.two_sided import round_rows
from lord_quant.truncation import in_form, truncate, weigh


ANCHOR_DAMPING = 0.01
OUTPUT_DAMPING, FEW_TOKENS = 5.0, 8192
"""Damping of an anchor that is learnt from outputs, in inputs per token, of so many tokens; it falls with their square.
Found on small models: of 8192 tokens 0.6 is wanted where there are 1024 inputs and 0.16 where there are 256, or taking back
the stream's errors does harm; of 24576, 0.01 and 0.2 are as good; of 65536, 0.08 loses a few percent of what 0.01 saves."""


class Stacked(NamedTuple):
    """One compressed layer.

    Attributes:
        factors: As they will be read back; None for a layer that stays dense.
        weight: The weight of a layer that stays dense, as it will be read back; else None.
        bias: With shape (out_features,), or None.
        quantized: What to pack, by suffix: ``.down`` and ``.up``, or an empty suffix; empty for float.
        spectrum: The decomposition's spectrum, in the metric of its truncation, or None for a layer that stays dense.
        error: ‖Ŵ − T‖² / ‖T‖² in the metric of the truncation: share of the output energy, weighted by what it does to the
            loss if that is known, lost to truncation and rounding together.
        largest_coefficient: Largest magnitude in a pivoted layer's predictor before quantization, else None.
        remedies: What the numerics needed; empty when nothing.
    """

    factors: Factors | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    quantized: dict[str, Quantized]
    spectrum: OutputSpectrum | None
    error: float
    largest_coefficient: float | None
    remedies: tuple[str, ...] = ()


def stack_layer(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    moments: PairedMoments,
    rank: int | None,
    form: str,
    solve: Solver | Solvers | None,
    options: JointConfig,
    *,
    metric: torch.Tensor | None = None,
    mean_correction: bool = True,
    seed: int = 0,
) -> Stacked:
    """Compresses one layer.

    Args:
        weight: W with shape (m, n).
        bias: With shape (m,), or None.
        moments: Of the layer's inputs in both streams.
        rank: Rank of the factors, or None for a layer that stays dense.
        form: `two_factor`, `pivoted` or `column_pivoted`.
        solve: Quantizes a weight in a metric; two may be given, for `down` (or the dense layer) and for `up`. None leaves
            factors in float.
        options: Which ideas are on.
        metric: G with shape (m, m), as `unit_metric` returns it; None if all outputs count alike.
        mean_correction: Whether factors may get a bias their layer did not have.
        seed: Of the rotation.

    Raises:
        NumericsError: Weight or moments hold NaN or inf, scales overflow float16, or a solve fails whatever the damping.
        RankError: The rank is out of range for the form.
    """
    notes = list[str]()
    weight = weight.to(moments.covariance)
    may_shift = bias is not None or (rank is not None and mean_correction)
    moments = moments if may_shift else moments.raw()
    target = anchored_target(weight, moments, notes.append) if options.anchor else weight
    quantize = None if solve is None else refined(solve, options.refine)
    quantized: dict[str, Quantized] = {}
    factors, spectrum, coefficient = None, None, None
    outputs = None if metric is None else metric.to(weight)
    coupled = outputs if options.two_sided else None
    if rank is None:
        quantized = {"": round_rows(quantize.down, target, moments.covariance, coupled)} if quantize else {}
        result = quantized[""].weight() if quantized else target
    else:
        spectrum, factors = truncate(weigh(target, outputs), moments.covariance, rank)
        factors = in_form(factors, form, outputs)
        coefficient = factors.largest_coefficient()
        if quantize is not None:
            objective = Objective(target, moments.covariance, outputs)
            quantized = stack_factors(objective, factors, quantize, options, seed, notes.append)
            factors = factors._replace(down=quantized[".down"].weight(), up=quantized[".up"].weight())
        result = factors.product()
    shifted = None if bias is None else bias.to(weight)
    if may_shift:
        shift = moments.output_mean(weight) - result @ moments.mean
        shifted = shift if shifted is None else shifted + shift
    return Stacked(
        factors=None if factors is None else factors._replace(bias=shifted),
        weight=result if factors is None else None,
        bias=shifted,
        quantized=quantized,
        spectrum=spectrum,
        error=relative_error(result, target, moments.covariance, outputs, spectrum.total() if spectrum else None),
        largest_coefficient=coefficient,
        remedies=(*(() if spectrum is None else spectrum.remedies), *notes),
    )


def anchored_target(weight: torch.Tensor, moments: PairedMoments, note: Note | None = None) -> torch.Tensor:
    """Returns T = W + W (C − H)(H + λI)⁻¹: the weight that best gives the dense outputs from the compressed inputs.

    Where outputs or the stream are aimed at, what is taken back is also what other layers have missed, little of which the
    inputs tell: from few tokens chance would be learnt, and λ is larger there.
    """
    damping, tokens = ANCHOR_DAMPING, moments.num_tokens
    if moments.of_outputs:
        few = OUTPUT_DAMPING * len(moments.covariance) / tokens * (FEW_TOKENS / tokens)
        damping = min(max(damping, few), 1.0)
    return weight + damped_right_solve(moments.drift(weight), moments.covariance, damping, note)
