"""Prints the part of a process: COORDINATOR INDEX of two, or what it finds alone."""

import sys
import time

from jaxreg.errors import UserError
from jaxreg.registration import parts
from jaxreg.training import parallel

if len(sys.argv) == 3:
    index = int(sys.argv[2])
    parallel.start_processes(sys.argv[1], 2, index, patience_s=parts._PATIENCE_S)
    time.sleep(2 * index)
try:
    part = parts.part_of_process()
    print(f"{part.number}/{part.count}")
except UserError as error:
    print(error)
