package servers

import (
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
)

// Ports are taken from below the range that Linux gives to outgoing connections
// (32768 and up): a test that opens thousands of them would else sooner or later
// hold the port of a server that is down at the moment.
const firstPort, lastPort = 20000, 31999

// FreePort returns the first of n successive TCP ports on which nothing listens
// on loopback. The choice is random, so that programs which choose at the same
// time hardly ever choose alike.
func FreePort(n int) (int, error) {
	for range 1000 {
		port := firstPort + rand.IntN(lastPort-firstPort-n)
		if portsFree(port, n) {
			return port, nil
		}
	}
	return 0, errors.New("no free TCP port on loopback")
}

func portsFree(first, n int) bool {
	for port := first; port < first+n; port++ {
		listener, err := net.Listen("tcp", loopback(port))
		if err != nil {
			return false
		}
		listener.Close()
	}
	return true
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
