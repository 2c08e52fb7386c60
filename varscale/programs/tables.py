"""Plain-text tables of leaves, for a terminal or a log."""

from collections.abc import Iterable, Sequence


def table_text(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> str:
    """A table without colours, `width` characters wide at most; long cells are folded."""
    import rich.box
    import rich.console
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = rich.console.Console(
        width=width, color_system=None, force_terminal=False, markup=False, highlight=False, emoji=False
    )
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()) + "\n"


def shape_text(shape: Sequence[int]) -> str:
    """The shape as people write it: 3×3×64, or the word scalar."""
    return "×".join(map(str, shape)) if shape else "scalar"
