// Written by benchmarks/fit_polynomials.py: nearly minimax, in float32.

// (exp(x) - 1 - x) / x^2 for |x| <= log(2) / 2
AOT floats aot_exp_polynomial(floats x) {
  floats p = aot_floats(0x1.6d68460000000p-10f);
  p = aot_fma(p, x, aot_floats(0x1.123ac00000000p-7f));
  p = aot_fma(p, x, aot_floats(0x1.5554d00000000p-5f));
  p = aot_fma(p, x, aot_floats(0x1.5554900000000p-3f));
  p = aot_fma(p, x, aot_floats(0x1.0000000000000p-1f));
  return p;
}

// (log(1 + x) - x + x^2 / 2) / x^3 for sqrt(1/2) <= 1 + x <= sqrt(2)
AOT floats aot_log_polynomial(floats x) {
  floats p = aot_floats(0x1.1481ca0000000p-4f);
  p = aot_fma(p, x, aot_floats(-0x1.de10fc0000000p-4f));
  p = aot_fma(p, x, aot_floats(0x1.e6c1fe0000000p-4f));
  p = aot_fma(p, x, aot_floats(-0x1.fc26d80000000p-4f));
  p = aot_fma(p, x, aot_floats(0x1.233b6a0000000p-3f));
  p = aot_fma(p, x, aot_floats(-0x1.555c4c0000000p-3f));
  p = aot_fma(p, x, aot_floats(0x1.99a4780000000p-3f));
  p = aot_fma(p, x, aot_floats(-0x1.0000060000000p-2f));
  p = aot_fma(p, x, aot_floats(0x1.5555480000000p-2f));
  return p;
}

// (tanh(x) / x - 1) / z of z = x^2 for |x| <= 0.625
AOT floats aot_tanh_polynomial(floats x) {
  floats p = aot_floats(0x1.1ace3e0000000p-9f);
  p = aot_fma(p, x, aot_floats(-0x1.0c895e0000000p-7f));
  p = aot_fma(p, x, aot_floats(0x1.63ad180000000p-6f));
  p = aot_fma(p, x, aot_floats(-0x1.b9f2200000000p-5f));
  p = aot_fma(p, x, aot_floats(0x1.11107c0000000p-3f));
  p = aot_fma(p, x, aot_floats(-0x1.5555540000000p-2f));
  return p;
}

// erf(x) / x - 1 of z = x^2 for |x| <= 1
AOT floats aot_erf_polynomial(floats x) {
  floats p = aot_floats(-0x1.7406180000000p-20f);
  p = aot_fma(p, x, aot_floats(0x1.5f4fb20000000p-14f));
  p = aot_fma(p, x, aot_floats(-0x1.a80ca00000000p-11f));
  p = aot_fma(p, x, aot_floats(0x1.54676c0000000p-8f));
  p = aot_fma(p, x, aot_floats(-0x1.b8028e0000000p-6f));
  p = aot_fma(p, x, aot_floats(0x1.ce2d6a0000000p-4f));
  p = aot_fma(p, x, aot_floats(-0x1.8127400000000p-2f));
  p = aot_fma(p, x, aot_floats(0x1.06eba80000000p-3f));
  return p;
}

// log(erfc(x)) for 1 <= x <= 4
AOT floats aot_erfc_polynomial(floats x) {
  floats p = aot_floats(-0x1.6c18160000000p-16f);
  p = aot_fma(p, x, aot_floats(0x1.cef63c0000000p-12f));
  p = aot_fma(p, x, aot_floats(-0x1.139bde0000000p-8f));
  p = aot_fma(p, x, aot_floats(0x1.9d0d5a0000000p-6f));
  p = aot_fma(p, x, aot_floats(-0x1.bc19400000000p-4f));
  p = aot_fma(p, x, aot_floats(-0x1.4434e80000000p-1f));
  p = aot_fma(p, x, aot_floats(-0x1.212c2e0000000p+0f));
  p = aot_fma(p, x, aot_floats(0x1.8b40480000000p-13f));
  return p;
}
