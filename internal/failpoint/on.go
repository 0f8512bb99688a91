//go:build failpoint

package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// order is what TXBOX_FAILPOINT says.
type order struct {
	point, deed string
	after       int64
	hits        atomic.Int64
}

var armed = arm(os.Getenv("TXBOX_FAILPOINT"))

// arm panics on what it does not understand: a run without its fault proves nothing.
func arm(text string) *order {
	if text == "" {
		return &order{}
	}
	point, rest, _ := strings.Cut(text, "=")
	deed, number, _ := strings.Cut(rest, "@")
	after, err := strconv.ParseInt(number, 10, 64)
	if err != nil || after < 1 || point == "" || deed != "kill" && deed != "panic" && deed != "stop" {
		panic(fmt.Sprintf("failpoint: TXBOX_FAILPOINT %q is not point=kill|panic|stop@number", text))
	}
	return &order{point: point, deed: deed, after: after}
}

// Hit does at this point what TXBOX_FAILPOINT says.
func Hit(point string) {
	if point != armed.point || armed.hits.Add(1) != armed.after {
		return
	}
	fmt.Fprintln(os.Stderr, "failpoint", point, armed.deed)
	switch armed.deed {
	case "kill":
		kill(syscall.SIGKILL)
		select {} // the signal is on its way
	case "panic":
		panic("failpoint " + point)
	case "stop":
		kill(syscall.SIGSTOP)
	}
}

func kill(signal syscall.Signal) {
	if err := syscall.Kill(os.Getpid(), signal); err != nil {
		panic(err)
	}
}
