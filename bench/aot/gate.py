"""What `make aot` objects to in a table of compiled kernels."""

from memflow_ops.kernels.aot import SHARED_MEMORY_LIMIT

ALLOWED_GROWTH = 1.1

# Where spills are allowed, they are at most this share of the instructions of the main loop.
ALLOWED_SPILLS = 0.025

# In backward_keys_kernel a product starts from what would be subtracted from it, which is written while another is in
# flight: ptxas waits for that one first (C7517). Two products then do not overlap; registers would not hold both.
WAITS_FOR_A_PRODUCT = "backward_keys_kernel"

# ptxas adds a fence before a product whose operands are in registers; nothing waits for a product.
FENCE = "C7519"

# Single queries are ranked by moments in float32, because the square of a query does not fit in a half precision.
SCORED_IN_FLOAT32 = "moments: select_rows_kernel"


def complaints(version: str, result: dict, stored: dict, strict: bool = True) -> list[str]:
    """The complaints of the gate about the table of one triton version, one line each. stored: the tables before.

    strict: no spills in main loops, and on sm_90 none at all in half precisions. Otherwise ALLOWED_SPILLS, for shapes
    beyond the shipped ones and tritons that take more registers than the one which the tables were made with.
    """
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
            allowed = 0 if strict else ALLOWED_SPILLS * row.get("loop_instructions", 0)
            if strict and capability == 90 and "float32" not in name and row["spills"]:
                found.append(f"{where}: {row['spills']} spills")
            elif row.get("loop_spills", 0) > allowed:
                found.append(f"{where}: {row['loop_spills']} spills in the main loop")
            multiplies = any(kernel in name for kernel in ("attend_kernel", "select_rows_kernel", "backward_"))
            multiplies &= SCORED_IN_FLOAT32 not in name
            # Tiles of less than 64 rows are multiplied by HMMA, the product of sm_80.
            products = sum(row.get(opcode, 0) for opcode in ("HMMA", "HGMMA"))
            if capability == 90 and "float32" not in name and multiplies and not products:
                found.append(f"{where}: no tensor-core products")
            remarks = set(row.get("remarks", ())) - {FENCE}
            if WAITS_FOR_A_PRODUCT in name:
                remarks.discard("C7517")
            if remarks & {"C7510", "C7515"}:
                found.append(f"{where}: ptxas makes products wait for one another ({', '.join(sorted(remarks))})")
            elif remarks:
                found.append(f"{where}: ptxas adds a wait between products ({', '.join(sorted(remarks))})")
            found += [f"{where}: {hazard}" for hazard in row.get("hazards", ())]
            if row.get("jit_compiles_anew"):
                found.append(f"{where}: the just-in-time compiler would not find what was compiled ahead of time")
            before = stored.get(version, {}).get(architecture, {}).get(name)
            for what in ("registers", "loop_instructions", "barriers_outside"):
                if before and what in before and row[what] > ALLOWED_GROWTH * before[what]:
                    found.append(
                        f"{where}: {what} grew from {before[what]} to {row[what]}; --renew stores the new table"
                    )
    return found
