"""Legend of the dimension letters used in shapes throughout jaxmoe.

B sequences · T new tokens packed in a step · S cached positions · D hidden · F expert intermediate
· V vocabulary · L layers · N query heads (or outputs of a linear map) · K KV heads (or inputs of a
linear map) · G = N/K · H head dim · C MLA latent · E routed experts · A experts activated per token
· R rows of a step (sequences it touches) · P pages · Z page size · MP pages a row may hold.
C++ keeps GEMM's m, n, k.
"""
