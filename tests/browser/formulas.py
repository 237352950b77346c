r"""Thirty formulas as models write them, for tests and for the page that is looked at."""
from __future__ import annotations

FORMULAS = [
    r"\frac{\sqrt{\pi}}{2}", r"\sqrt{x^2 + y^2} = r", r"\sqrt[3]{\frac{a+b}{c}}",
    r"x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}",
    r"\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}", r"\sum_{n=1}^{\infty} \frac{1}{n^2} = \frac{\pi^2}{6}",
    r"\prod_{p} \frac{1}{1 - p^{-s}} = \zeta(s)", r"\lim_{x \to 0} \frac{\sin x}{x} = 1",
    r"\begin{pmatrix} a & b \\ c & d \end{pmatrix} \begin{bmatrix} 1 \\ 0 \end{bmatrix}",
    r"f(x) = \begin{cases} x^2 & \text{if } x > 0 \\ 0 & \text{otherwise} \end{cases}",
    r"\nabla \times \mathbf{E} = -\frac{\partial \mathbf{B}}{\partial t}", r"e^{i\pi} + 1 = 0",
    r"\hat{y} = \bar{x} + \vec{v} + \dot{q} + \tilde{w}", r"\left( \frac{a}{b} \right)^{n} + \left\| v \right\|_2",
    r"\mathbb{E}[X] = \int x\, p(x)\, dx", r"\mathcal{L}(\theta) = -\sum_i y_i \log \hat{y}_i",
    r"\binom{n}{k} = \frac{n!}{k!(n-k)!}", r"\underbrace{a + \dots + a}_{n \text{ times}} = na",
    r"A \cup B \subseteq C \implies A \subseteq C", r"\forall \epsilon > 0\ \exists \delta : |x - a| < \delta",
    r"\mathrm{softmax}(z)_i = \frac{e^{z_i}}{\sum_j e^{z_j}}",
    r"\mathrm{Attention}(Q,K,V) = \mathrm{softmax}\left(\frac{QK^\top}{\sqrt{d_k}}\right)V",
    r"\ce{H2O} \to \mathrm{H_2O}", r"\oint_C \vec{F} \cdot d\vec{r} = \iint_S (\nabla \times \vec{F}) \cdot d\vec{S}",
    r"\overline{AB} \parallel \overline{CD}, \angle ABC = 90^\circ", r"x_{1,2} = \lambda \pm \mu^{2^{n}}",
    r"\begin{aligned} a &= b + c \\ d &= e - f \end{aligned}", r"\cfrac{1}{1 + \cfrac{1}{1 + \cfrac{1}{1+x}}}",
    r"p(\theta \mid x) \propto p(x \mid \theta)\, p(\theta)",
    r"\sqrt{1 + \sqrt{1 + \sqrt{1 + \sqrt{1 + \frac{x}{\sqrt{y}}}}}} \approx \Gamma\!\left(\tfrac{1}{2}\right)"]


def page_of_formulas() -> str:
    """Every one in a paragraph and displayed."""
    return "\n\n".join(f"{i}. Here ${text}$ in a line\n\n$$\n{text}\n$$" for i, text in enumerate(FORMULAS, 1))
