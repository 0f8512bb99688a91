// Package faultproxy stands between a client and a server on loopback, forwards what
// they send, and breaks what it is told to:
//
//	proxy, err := faultproxy.New("127.0.0.1:5432", faultproxy.PostgreSQL)
//	pool, err := pgxpool.New(ctx, proxy.URL(databaseURL)) // with sslmode=disable
//	proxy.Stall()                                         // a peer that stops reading
//	proxy.Heal()
//
// A fault holds for the links that there are and for those that come, until Heal. Cut
// and CutAfter hit links once. Intercept sees whole messages of the protocol, and says of
// each what becomes of it: a confirm is lost, an answer to COMMIT is.
//
// Toxiproxy has the same faults of the network, but no messages, which are half of what
// is needed here, and would bring an HTTP interface and its dependencies.
package faultproxy
