package relay

import (
	"context"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// pause waits, or returns why ctx ended.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// notify makes a channel of capacity one readable, if it is not.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// began is where our monotonic clock starts.
var began = time.Now()

func since() int64 { return int64(time.Since(began)) }

// maxReconnect bounds the pause between two attempts to reach a server.
const maxReconnect = 3 * time.Second

func newBackOff() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = 50*time.Millisecond, maxReconnect*2/3 // it adds up to a half
	return b
}
