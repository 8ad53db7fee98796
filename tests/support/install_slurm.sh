#!/usr/bin/env bash
# Debian's SLURM for tests/system, without starting its daemons. Needs root and apt; says why where it cannot.
set -uo pipefail
if command -v slurmctld slurmd sbatch munged > /dev/null; then exit 0; fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "SLURM is not installed here (needs root and apt-get): its tests are skipped"
    exit 0
fi
policy=/usr/sbin/policy-rc.d # maintainer scripts ask it whether they may start a daemon
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge)
install=(timeout 120 apt-get -o Acquire::http::Timeout=10 -o Acquire::Retries=0 -q)
"${install[@]}" install -y --no-install-recommends "${packages[@]}" > /dev/null 2>&1 ||
    { "${install[@]}" update && "${install[@]}" install -y --no-install-recommends "${packages[@]}"; } > /dev/null 2>&1 ||
    echo "apt-get cannot install SLURM here: its tests are skipped"
