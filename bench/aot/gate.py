"""What `make aot` objects to in a table of compiled kernels."""

from memflow_ops.kernels.aot import SHARED_MEMORY_LIMIT

ALLOWED_GROWTH = 1.1


def complaints(version: str, result: dict, stored: dict) -> list[str]:
    """The complaints of the gate about the table of one triton version, one line each. stored: the tables before."""
    found = []
    for architecture, rows in result.items():
        capability = int(architecture.removeprefix("sm_"))
        for name, row in rows.items():
            where = f"triton {version}, {architecture}, {name}"
            if "error" in row:
                found.append(f"{where}: does not compile: {row['error']}")
                continue
            if row["shared_bytes"] > SHARED_MEMORY_LIMIT[capability]:
                found.append(f"{where}: {row['shared_bytes']} bytes of shared memory")
            if capability == 90 and "float32" not in name and row["spills"]:
                found.append(f"{where}: {row['spills']} spills")
            elif row.get("loop_spills"):
                found.append(f"{where}: {row['loop_spills']} spills in the main loop")
            multiplies = any(kernel in name for kernel in ("attend_kernel", "select_rows_kernel", "backward_"))
            # Tiles of less than 64 rows are multiplied by HMMA, the product of sm_80.
            products = sum(row.get(opcode, 0) for opcode in ("HMMA", "HGMMA"))
            if capability == 90 and "float32" not in name and multiplies and not products:
                found.append(f"{where}: no tensor-core products")
            if row.get("jit_compiles_anew"):
                found.append(f"{where}: the just-in-time compiler would not find what was compiled ahead of time")
            before = stored.get(version, {}).get(architecture, {}).get(name)
            for what in ("registers", "loop_instructions"):
                if before and what in before and row[what] > ALLOWED_GROWTH * before[what]:
                    found.append(
                        f"{where}: {what} grew from {before[what]} to {row[what]}; --renew stores the new table"
                    )
    return found
