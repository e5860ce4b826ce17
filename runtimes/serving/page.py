"""`/docs`: the routes on one page that loads nothing."""

import json
from html import escape
from typing import Any

PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}td{padding:.1rem .8rem .1rem 0;"
    "vertical-align:top}code,pre{background:#8882;padding:.1rem .3rem}pre{overflow:auto}"
)


def page(openapi: dict[str, Any]) -> str:
    """HTML of an OpenAPI description: each route with the fields of its body."""
    title, schemas = escape(openapi["info"]["title"]), openapi.get("components", {}).get("schemas", {})
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title} {escape(openapi['info']['version'])}</h1>",
        "<p>The same for programs: <a href=openapi.json>openapi.json</a></p>",
    ]
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            parts.append(
                f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(route.get('summary', ''))}</p>"
            )
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            parts.append(_table(body))
    for name, schema in schemas.items():
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p>{_table(schema)}")
    return "".join(parts)


def _table(schema: dict[str, Any]) -> str:
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(field))}<td>{escape(field.get('description', ''))}"
        for name, field in schema.get("properties", {}).items()
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _kind(field: dict[str, Any]) -> str:
    """The type of a field in words."""
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return str(field.get("type") or field.get("$ref", "").rpartition("/")[2])
