// exp of a vector of up to 88, to within 2 ulp (Cephes' expf); below -87 exactly zero. Included
// inside an anonymous namespace, after simd_*.inl.
inline V vexp(V x) {
  const V bounded = max(x, set1(-87.0f));
  const V shifted = fma(bounded, set1(1.44269504088896341f), set1(12582912.0f));
  const V n = sub(shifted, set1(12582912.0f));
  V r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  // Masked positions carry minus infinity and must weigh exactly nothing. NaN passes: it is not
  // below.
  return zero_below(x, -87.0f, add(mul(p, pow2(shifted)), sub(x, x)));
}
