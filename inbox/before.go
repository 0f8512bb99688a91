package inbox

import (
	"context"
	"errors"
	"fmt"
)

// prepare calls Config.Before for a message, and keeps what it returned for the handler.
func (c *Consumer) prepare(ctx context.Context, m *item) error {
	if c.cfg.Before == nil {
		return nil
	}
	beforeCtx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	err := safely("Before", func() (err error) {
		m.before, err = c.cfg.Before(beforeCtx, m.message(m.attempt))
		if err == nil && m.before == nil {
			err = errors.New("no context was returned by Before")
		}
		return err
	})
	if err != nil && beforeCtx.Err() != nil && ctx.Err() == nil && !isDeliberate(err) {
		err = fmt.Errorf("not done after %s: %w", c.cfg.Timeout, err)
	}
	return err
}

// handlerContext is ctx with the values of what Before returned. Its deadline was Before's
// own.
type handlerContext struct {
	context.Context
	values context.Context
}

func (h handlerContext) Value(key any) any {
	if v := h.values.Value(key); v != nil {
		return v
	}
	return h.Context.Value(key)
}

// prepareDelivered calls Before for a delivered message, unless it is recorded already or
// has to wait behind another of its key; what is so found out in vain the transaction finds
// out again. If Before fails the message is parked, and false is returned.
func (c *Consumer) prepareDelivered(ctx, live context.Context, m *item) bool {
	if c.cfg.Before == nil {
		return true
	}
	var skip bool
	ok := c.persevere(live, func(ctx context.Context) error {
		return c.db.QueryRow(ctx, skipBeforeSQL(c.cfg.Schema), unplanned, c.cfg.Name, m.id(), m.storableKey()).Scan(&skip)
	})
	if !ok || skip {
		return ok
	}
	err := c.prepare(ctx, m)
	switch {
	case err == nil:
		return true
	case ctx.Err() == nil:
		c.failed(live, m, false, err)
	}
	return false
}
