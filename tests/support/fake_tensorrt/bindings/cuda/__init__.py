"""cuda-python from 13 on."""
