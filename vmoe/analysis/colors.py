"""The color of each expert, the same in every figure and page.

The first seven colors are by Okabe and Ito (https://jfly.uni-koeln.de/color/). Each further color
is the one in an sRGB grid that is farthest from gray and from all colors before it, in the worst
case of normal vision and three kinds of dichromacy (Machado et al. 2009; distances in OKLab). Not
all 32 can be distinguished, so figures also show the number of the expert.
"""

COLORS = (
    *("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#5a0f00"),
    *("#0f1e78", "#78ffff", "#962d3c", "#2d00d2", "#a5d2a5", "#b42dff", "#5a4b78", "#c32d00"),
    *("#4b2d4b", "#b4ffa5", "#a578f0", "#87d2ff", "#96b478", "#d200b4", "#6900a5", "#e1c35a"),
    *("#875a69", "#781e1e", "#2d3c78", "#ff78d2", "#96f0c3", "#965ad2", "#0000ff", "#b40f96"),
)


def expert_colors(e: int) -> tuple[str, ...]:
    """A color for each of e experts, as #rrggbb; there are 32 colors, which repeat.

    An expert's color does not depend on e. No color is gray, which marks patches without a routed
    expert.

    >>> expert_colors(2)
    ('#e69f00', '#56b4e9')
    """
    return tuple(COLORS[i % len(COLORS)] for i in range(e))


def text_color(color: str) -> str:
    """Black or white, whichever has the higher contrast to a color (as in WCAG 2).

    >>> text_color("#f0e442"), text_color("#0f1e78")
    ('#000000', '#ffffff')
    """
    values = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if luminance > 0.179 else "#ffffff"  # where both contrasts are equal
