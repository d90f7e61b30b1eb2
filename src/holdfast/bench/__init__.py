"""How fast, and with how much memory: the library beside other implementations, in one process, on random inputs.

`settings` what may be chosen · `timing` interleaved variants, medians and ratios · `memory` peaks · `ceilings` what the
machine can do · `setup` what all benchmarks begin and end with · `peers`, `models` the implementations ·
`ops`, `prefill`, `decode`, `train`, `efficiency` what is measured · `results`, `costs` numbers as data · `plots`,
`efficiency_plots` numbers to look at.
"""
