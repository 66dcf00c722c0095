"""Prompts: the instruction in front of a query (arXiv 2603.19223 section 3.3; template of mteb's registry entry)."""

TEMPLATE = "Instruct: {instruction}\nQuery: "


def query_prefix(instruction: str, template: str = TEMPLATE) -> str:
    """What stands in front of a query's text; documents stay bare."""
    return template.replace("{instruction}", instruction)
