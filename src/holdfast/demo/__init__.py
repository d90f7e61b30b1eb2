"""The demonstration: five small models, trained here and now, and what each of them remembers.

`settings` what may be chosen · `training` the models in processes of their own · `measure` what a trained model does ·
`report` table, claim and files · `runner` one after the other.
"""
